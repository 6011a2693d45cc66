"""Ctrl-C: one line that says what is safe, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from florana.errors import FloranaError


class Interrupted(Exception):  # noqa: N818  (a person's wish)
    """A Ctrl-C, with a line for the person who pressed it; typer ends at a KeyboardInterrupt without a word."""


@contextmanager
def safe_rounds(folder: Path, command: str) -> Iterator[None]:
    """Tell a Ctrl-C inside how many rounds of the run are committed.

    Args:
        folder: the run folder.
        command: what goes on with it.

    Raises:
        Interrupted: in the place of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        from florana.federation.journal import read_records

        try:
            done = len(read_records(folder / "rounds.jsonl"))
        except (FloranaError, OSError):
            done = 0
        safe = "no round was committed yet" if not done else f"{done} round{'s are' if done > 1 else ' is'} safe"
        raise Interrupted(f"interrupted; {safe}; go on with: {command}") from None
