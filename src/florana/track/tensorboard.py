"""TensorBoard's event files, by torch's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class TensorboardTracker:
    """A run's event files in its own folder.

    Args:
        store: where all runs of one tracker lie; not needed here.
        own: the run's folder.
        run: the run's name; not needed here.
        settings: the recipe.
        last: the last round that is logged already; 0 for none.
        known: what `keeps` gave then.
    """

    def __init__(
        self, store: Path, own: Path, run: str, settings: Mapping[str, Any], last: int, known: Mapping[str, str]
    ) -> None:
        del store, run, known
        self._own = own
        _without_machine(own)
        # a round that was written, but not noted as such before a kill, is read once
        self._writer = SummaryWriter(str(own), purge_step=last + 1 if last else None)
        if not last:
            lines = [f"    {name} = {value}" for name, value in settings.items()]
            self._writer.add_text("recipe", "\n".join(lines), 0)

    def keeps(self) -> Mapping[str, str]:
        """Nothing: the folder is the run."""
        return {}

    def log(self, round_: int, figures: Mapping[str, float]) -> None:
        """A round's figures, flushed to the file."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round_)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()
        _without_machine(self._own)


def _without_machine(folder: Path) -> None:
    """The writer puts the machine's name and process into the files' names; TensorBoard wants `tfevents` alone.

    Their order by name is that of their times. Only closed files are renamed: an open one is written by its name.
    """
    for path in folder.glob("events.out.tfevents.*.*"):
        time = path.name.split(".")[3]
        place, count = folder / f"events.out.tfevents.{time}", 0
        while place.exists():
            count += 1
            place = folder / f"events.out.tfevents.{time}-{count}"
        path.rename(place)
