"""Trackers beside a run: each committed round once, from what the run folder holds; a tracker's error ends nothing.

A tracker follows rounds.jsonl, and keeps in its own `logged.json` up to which round it is: after a kill it catches up.

    PLACE/track/<tracker>/[<run>/]   its files, and logged.json
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from florana.atomic_files import replace_file
from florana.bounded import read_json, read_toml
from florana.displayable import displayable
from florana.errors import FloranaError
from florana.federation.event import Event
from florana.federation.journal import read_records
from florana.federation.round_record import RoundRecord
from florana.track.round_figures import figures_of, settings_of

TRACKERS = {"tensorboard": "TensorboardTracker", "wandb": "WandbTracker", "mlflow": "MlflowTracker"}
"""The trackers, each a module of this room and of a library, and its class."""


class Tracker(Protocol):
    """What every tracker does."""

    def keeps(self) -> Mapping[str, str]:
        """What it needs to go on with the same run later."""

    def log(self, round_: int, figures: Mapping[str, float]) -> None:
        """A round's figures."""

    def finish(self) -> None:
        """The end, of the run or of this part of it."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise ModuleNotFoundError, which names the package, where a tracker's library is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


class Tracking:
    """The trackers of one run.

    Args:
        folder: the run folder that is followed.
        place: where `track/` is made: the run folder, or a study's.
        run: the run's name in a study; empty where `place` is the run's own.
        names: the trackers.
        say: told in a line of a tracker that failed; it is not asked again.
    """

    def __init__(self, folder: Path, place: Path, run: str, names: Sequence[str], say: Callable[[str], None]) -> None:
        self._folder, self._place, self._run, self._say = folder, place, run, say
        self._names = list(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}
        self._last: dict[str, int] = {}
        self._seen = -1

    def look(self) -> None:
        """Log every committed round that is not logged yet."""
        path = self._folder / "rounds.jsonl"
        if not self._names or not path.exists() or path.stat().st_size == self._seen:
            return
        try:
            self._seen, records = path.stat().st_size, read_records(path)
        except (FloranaError, OSError):  # of a file that is no journal the run itself will tell
            return
        for record in records:
            self.log(record)

    @property
    def last(self) -> int:
        """The last round that every tracker has; 0 where one has none."""
        return min((self._last.get(name, 0) for name in self._names), default=0)

    def log(self, record: RoundRecord) -> None:
        """Log one committed round, where it is not logged yet."""
        for name in list(self._names):
            try:
                self._log(name, record)
            except Exception as error:  # whatever a library raises: the run is more than its tracker
                self._drop(name, error)

    def close(self) -> None:
        """End all trackers; those that look again go on where they were."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.finish()
            except Exception as error:
                self._drop(name, error)
        self._open.clear()
        self._seen = -1

    def _log(self, name: str, record: RoundRecord) -> None:
        own = self._place / "track" / name / self._run
        marker = own / "logged.json"
        if name not in self._open:
            if record.round <= self._last.get(name, 0):
                return
            known: dict[str, Any] = read_json(marker) if marker.exists() else {"round": 0, "kept": {}}
            self._last[name] = int(known["round"])
        if record.round <= self._last[name]:
            return
        if name not in self._open:
            own.mkdir(parents=True, exist_ok=True)
            made = getattr(importlib.import_module(f"florana.track.{name}"), TRACKERS[name])
            settings = settings_of(read_toml(self._folder / "recipe.toml"))
            title = self._run or self._folder.resolve().name
            self._open[name] = made(self._place / "track" / name, own, title, settings, self._last[name], known["kept"])
        self._open[name].log(record.round, figures_of(record))
        content = {"round": record.round, "kept": dict(self._open[name].keeps())}
        replace_file(marker, (json.dumps(content) + "\n").encode())
        self._last[name] = record.round

    def _drop(self, name: str, error: Exception) -> None:
        self._names.remove(name)
        self._open.pop(name, None)
        told = displayable(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        self._say(f"tracking by {name} has ended, the run goes on: {told}")


@contextmanager
def tracked(
    folder: Path, names: Sequence[str], show: Callable[[Event], None], say: Callable[[str], None]
) -> Iterator[Callable[[Event], None]]:
    """The run in a folder, tracked: what to call with its events in the place of `show`.

    Args:
        folder: the run folder.
        names: the trackers.
        show: told of every event.
        say: see `Tracking`.
    """
    tracking = Tracking(folder, folder, "", names, say)
    caught_up = False

    def follow(event: Event) -> None:
        nonlocal caught_up
        show(event)
        if event.kind == "committed" and event.record is not None:
            if not caught_up:  # what was committed before a kill, and not logged any more
                tracking.look()
                caught_up = True
            tracking.log(event.record)

    try:
        yield follow
    finally:
        tracking.close()


@contextmanager
def tracked_study(
    place: Path, runs: Mapping[str, Path], rounds: int, names: Sequence[str], say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """The runs of a study, tracked from the process that leads it: what to call when a round was committed somewhere.

    Args:
        place: the study's folder.
        runs: a run's name -> its folder.
        rounds: of each run; one that has them all is closed.
        names: the trackers.
        say: see `Tracking`.
    """
    every = [Tracking(folder, place, run, names, say) for run, folder in runs.items()]

    def look() -> None:
        for tracking in every:
            if tracking.last < rounds:
                tracking.look()
                if tracking.last >= rounds:
                    tracking.close()

    try:
        yield look
        look()
    finally:
        for tracking in every:
            tracking.close()
