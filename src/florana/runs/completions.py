"""What a global model wrote in a generation benchmark, kept beside the figures: RUN/completions/round-N.jsonl.

One line per completion: `prompt`, `completion`, `verdict`. A round that is done again writes the same file again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from florana.atomic_files import explained, replace_file
from florana.bounded import json_of
from florana.errors import InputError

FOLDER = "completions"


def write_completions(folder: Path, round_: int, completions: Sequence[Mapping[str, Any]]) -> None:
    """Keep one scoring's completions, in the order of the problems.

    Args:
        folder: the run's.
        round_: after which the model wrote, from 1.
        completions: each with its prompt, its text and its verdict.

    Raises:
        FederationError: the disk refuses.
    """
    with explained(folder, "what the model wrote could not be kept"):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_lines(folder / FOLDER / f"round-{round_}.jsonl", completions)


def write_lines(file: Path, completions: Sequence[Mapping[str, Any]]) -> None:
    """Write completions into a file, one line each; its folder is there. Raises FederationError as the disk refuses."""
    lines = "".join(json.dumps(one, sort_keys=True) + "\n" for one in completions)
    with explained(file, "what the model wrote could not be kept"):
        replace_file(file, lines.encode())


def last_completions(folder: Path, most: int) -> tuple[int, list[dict[str, Any]]]:
    """(round, its first so many completions) of the last scoring that was kept; (0, []) where there is none.

    Args:
        folder: the run's.
        most: how many completions are read.

    Raises:
        InputError: the file cannot be read.
    """
    files = {int(path.stem.removeprefix("round-")): path for path in (folder / FOLDER).glob("round-*.jsonl")}
    if not files:
        return 0, []
    file = files[max(files)]
    try:
        with file.open(encoding="utf-8") as lines:
            return max(files), [json_of(line) for _, line in zip(range(most), lines, strict=False)]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read", why=str(error), fix="remove it: the report is made without"
        ) from None
