"""Ctrl-C: one line that says what is safe, and how to go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from florana.errors import FloranaError


class Interrupted(Exception):  # noqa: N818  (a person's wish)
    """A Ctrl-C, with a line for the person who pressed it; typer ends at a KeyboardInterrupt without a word."""


@contextmanager
def interruptible(line: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Give a Ctrl-C inside its line.

    Python drops the exception of a Ctrl-C that comes while an object is cleared away or a library looks away. So it is
    remembered, and what is given here, called now and then, raises it again.

    Args:
        line: what is said, made when it is needed.

    Raises:
        Interrupted: in the place of KeyboardInterrupt.
    """
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def again() -> None:
        if pressed:
            raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, note) if ours else None
    try:
        yield again
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {line()}") from None
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def safe(folders: Sequence[Path]) -> str:
    """How many rounds of some runs are committed, in words.

    Examples:
        >>> safe([Path("nowhere")])
        'no round was committed yet'
    """
    from florana.federation.journal import read_records

    done = 0
    for folder in folders:
        with contextlib.suppress(FloranaError, OSError):
            done += len(read_records(folder / "rounds.jsonl"))
    return "no round was committed yet" if not done else f"{done} round{'s are' if done > 1 else ' is'} safe"
