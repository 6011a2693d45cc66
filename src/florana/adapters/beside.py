"""Files beside an adapter's weights that say how it is asked: the tokenizer, and florana's own `florana.json`.

Where all adapters of a merge have the same ones, they stand beside the merge too. They are copied, byte for byte, and
never loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from florana.atomic_files import replace_file

USAGE = "florana.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MOST = 2**26
"""Bytes of one such file."""


def write_common_files(out: Path, folders: Sequence[Path]) -> None:
    """Write what all folders have alike; of a tokenizer all files or none, since half of one is another.

    Args:
        out: where the merge is written.
        folders: the adapters'.

    Raises:
        OSError: a file cannot be read or written.
    """
    for names in ((USAGE,), TOKENIZER):
        sets = [
            {name: content for name in names if (content := _read(folder / name)) is not None} for folder in folders
        ]
        if all(own == sets[0] for own in sets):
            for name, content in sets[0].items():
                replace_file(out / name, content)


def unlike_usage(folders: Sequence[Path]) -> list[str]:
    """A note where some folders say how they are asked, and not all say the same; else nothing."""
    if len({_read(folder / USAGE) for folder in folders}) < 2:
        return []
    return [
        f"the adapters do not say alike how they are asked ({USAGE}), and the merge says nothing: see that their "
        "classes have one order before you use an averaged head"
    ]


def _read(path: Path) -> bytes | None:
    """The file's bytes; None where there is none that is small and lies in the folder, or in the hub's cache of it."""
    if not path.is_file() or path.stat().st_size > MOST:
        return None
    root = path.parent.resolve()
    if root.parent.name == "snapshots":  # the cache links its files to blobs beside
        root = root.parent.parent
    return path.read_bytes() if path.resolve().is_relative_to(root) else None
