"""How a study stands, from its folder alone: each of its runs, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florana.bounded import read_json
from florana.errors import FloranaError, InputError
from florana.report.live import ended
from florana.report.views import shown, view
from florana.runs.run_folder import STUDY, at_work


@dataclass(frozen=True)
class LiveRun:
    """One run of a study.

    Args:
        name: setting, seed and method.
        rounds: how many are committed.
        score: the global model's, of the last round that was measured; None where there is none.
        why: why it failed; empty where it did not.
    """

    name: str
    rounds: int
    score: float | None
    why: str


@dataclass(frozen=True)
class LiveStudy:
    """How a study stands.

    Args:
        title: what it is called.
        runs: each of its runs, in their order.
        rounds: of each run.
        score: what the scores are.
        seconds_left: at the pace since it was begun or gone on with; None where nobody knows.
        every: seconds after which the page looks again.
        stopped: whether there is more to do, and no florana of this machine at work in the folder.
    """

    title: str
    runs: Sequence[LiveRun]
    rounds: int
    score: str
    seconds_left: float | None
    every: int
    stopped: bool

    @property
    def done(self) -> int:
        """How many runs have ended, well or not."""
        return sum(run.rounds >= self.rounds or bool(run.why) for run in self.runs)


def live_study_of(folder: Path, every: int, now: float | None = None) -> LiveStudy:
    """How the study in a folder stands.

    Args:
        folder: the study's.
        every: seconds after which the page looks again.
        now: the time; this moment where None.

    Raises:
        InputError: its files cannot be read.
    """
    begun = _table(folder / STUDY)
    failed = shown(_table(folder / "failures.json")) if (folder / "failures.json").exists() else {}
    try:
        cells = [str(cell) for cell in begun["cells"]]
        rounds, left_then, since = int(begun["rounds"]), int(begun["left"]), float(begun["time"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{folder / STUDY} cannot be read", why=f"{type(error).__name__}: {error}") from None
    if any(Path(cell).is_absolute() or ".." in Path(cell).parts for cell in cells):
        raise InputError(f"{folder / STUDY} cannot be read", why="a run lies outside of the study")
    runs, score = [], "score"
    for cell in cells:
        why, name = str(failed.get(cell, "")), shown(cell)
        try:
            own = view(folder / "runs" / cell)
        except FloranaError:  # not begun, or no round yet
            runs.append(LiveRun(name, 0, None, why))
            continue
        score = own.score
        done = rounds if ended(own.recipe, own.records) else len(own.records)
        runs.append(LiveRun(name, done, own.final("global"), why))
    left = sum(max(rounds - run.rounds, 0) for run in runs if not run.why)
    made, passed = left_then - left, (time.time() if now is None else now) - since
    seconds = 0.0 if left == 0 else passed / made * left if made > 0 and passed > 0 else None
    stopped = left > 0 and at_work(folder) is False
    return LiveStudy(shown(folder.resolve().name), runs, rounds, score, None if stopped else seconds, every, stopped)


def _table(path: Path) -> Mapping[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from None
    if not isinstance(found, dict):
        raise InputError(f"{path} cannot be read", why="it holds no table")
    return found
