"""A site's part in secure sums: its signatures, and what it has opened, on its own disk.

KEPT/opened.jsonl    one line for each sum, before its shares leave: run, [round, attempt, trip], session
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from florana.atomic_files import explained, without_torn_line
from florana.bounded import json_of
from florana.errors import InputError, RecipeError
from florana.federation.sealed_client import SealedClient, Spent
from florana.recipe import schema as r
from florana.runs.noisy_sums import hiding_of
from florana.runs.sealed_clients import sealing_of
from florana.secure.identities import Signer

OPENED = "opened.jsonl"


def sealed_at(recipe: r.Recipe, signer: Signer | None, rows: int, folder: Path) -> SealedClient | None:
    """The site's part; None where its recipe has no secure sums.

    Args:
        recipe: as the site reads it.
        signer: its signatures; None in a simulation of Flower's, which has none.
        rows: its training rows.
        folder: where it keeps what lasts.

    Raises:
        RecipeError: secure sums without signatures.
    """
    sealing = sealing_of(recipe)
    if sealing is None:
        return None
    if signer is None:
        raise RecipeError(
            "privacy.secure_aggregation does not run in a simulation of Flower's",
            why="its clients are begun anew for every message, and secrets of a session are kept in memory alone",
            fix="run it with 'florana run', or between sites with 'florana serve' and 'florana join'",
        )
    hiding = hiding_of(recipe, signer.name, folder, simulated=False)
    return SealedClient(signer, sealing, recipe.build_strategy().sums, rows, on_disk(folder / OPENED), hiding)


def on_disk(path: Path) -> Spent:
    """What was opened, in a file that is flushed before anybody is told.

    Args:
        path: the file, which need not exist.
    """

    def spent(run: str, which: tuple[int, int, int], session: str | None) -> str | None:
        known, key = _known(path), (run, which)
        if session is None or known.get(key) == session:
            return known.get(key)
        with explained(path.parent, "what was summed up could not be written down, so nothing is opened"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            without_torn_line(path)
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as stream:
                stream.write(json.dumps([run, which, session]).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        return session

    return spent


def _known(path: Path) -> dict[tuple[str, tuple[int, int, int]], str]:
    if not path.exists():
        return {}
    try:
        lines = path.read_bytes().split(b"\n")
        rows = [json_of(line) for line in lines[:-1] if line]  # one that was cut off opened nothing
        return {(run, (round_, attempt, trip)): session for run, (round_, attempt, trip), session in rows}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: what was summed up before cannot be read",
            why=f"{type(error).__name__}: {error}",
            fix="restore the file from a copy: without it the same update could be opened twice",
        ) from None
