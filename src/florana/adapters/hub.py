"""Adapters by hub name, wherever a folder is taken: through huggingface_hub's cache, and only an adapter's files."""

from __future__ import annotations

import re
from pathlib import Path

from florana.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json", "florana.json"]


def adapter_folder(name: Path) -> Path:
    """The folder of an adapter: itself where it is there, else what the hub has under that name, OWNER/NAME.

    Args:
        name: a folder, or a hub name.

    Raises:
        InputError: huggingface_hub is not installed, or the hub has no such adapter, or cannot be reached.

    Examples:
        >>> adapter_folder(Path("."))
        PosixPath('.')
    """
    if name.exists() or name.is_absolute() or not _NAME.fullmatch(str(name)):
        return name
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{name} is no folder here, and huggingface_hub, which could look on the hub, is not installed",
            fix="give a folder, or pip install huggingface_hub",
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=_FILES))
    except Exception as error:  # the client raises many kinds: not found, gated, offline
        raise InputError(
            f"{name} is no folder here, and could not be loaded from the hub",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="check the name and the connection",
        ) from None
