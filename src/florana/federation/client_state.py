"""The client state, on its own disk: by run and round, so that a resumed run finds it.

    FOLDER/<run>/<client>/round-000007.safetensors      as it was after that round

A round that the server had to do again starts from what the client kept before it, and so ends in the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from florana.atomic_files import explained, replace_file
from florana.errors import InputError

KEPT_ROUNDS = 2
"""The last round a client took part in, and the one before, should the server have lost the last."""

KEPT_RUNS = 64
"""A folder takes no more: each name of a run that a server sends makes another."""


def recall(folder: Path, run: str, client: str, round_: int) -> dict[str, Tensor]:
    """What the client kept when it last took part before `round_`; empty where it kept nothing.

    Args:
        folder: the site's folder.
        run: the name of the run.
        client: the client's name.
        round_: the round that is asked for, counted from 1.

    Raises:
        InputError: the file cannot be read.
    """
    earlier = [path for path in _files(folder, run, client) if _round_of(path) < round_]
    if not earlier:
        return {}
    try:
        return load(earlier[-1].read_bytes())
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{earlier[-1]}: what client '{client}' keeps cannot be read",
            why=str(error),
            fix="restore the file from a copy, or remove it: the client then begins as in the first round",
        ) from None


def keep(folder: Path, run: str, client: str, round_: int, tensors: Mapping[str, Tensor]) -> None:
    """Write what the client keeps after `round_`; nothing where there is nothing.

    Args:
        folder: the site's folder.
        run: the name of the run.
        client: the client's name.
        round_: the round that was done.
        tensors: what is kept.

    Raises:
        FederationError: the disk refuses.
        InputError: the folder holds `KEPT_RUNS` other runs already.
    """
    if not tensors:
        return
    place = _place(folder, run, client)
    runs = {path for path in folder.glob("*") if path.is_dir()} if folder.is_dir() else set()
    if place.parent not in runs and len(runs) >= KEPT_RUNS:
        raise InputError(
            f"{folder} holds what clients keep of {len(runs)} runs, and this would be another",
            why="a server could fill the disk with runs that it makes up",
            fix="remove the folders of runs that are done with",
        )
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with explained(folder, f"what client '{client}' keeps could not be written", "ask again"):
        place.mkdir(parents=True, exist_ok=True)
        replace_file(place / f"round-{round_:06d}.safetensors", content)
        for path in _files(folder, run, client)[:-KEPT_ROUNDS]:
            path.unlink()


def _place(folder: Path, run: str, client: str) -> Path:
    """Names come from elsewhere: they are no paths."""
    return folder / hashlib.sha256(run.encode()).hexdigest()[:16] / hashlib.sha256(client.encode()).hexdigest()[:16]


def _files(folder: Path, run: str, client: str) -> list[Path]:
    return sorted(_place(folder, run, client).glob("round-??????.safetensors"))


def _round_of(path: Path) -> int:
    return int(path.name.removeprefix("round-").partition(".")[0])
