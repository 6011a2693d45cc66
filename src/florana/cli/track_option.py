"""The option `--track` of the verbs that run rounds."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from florana.cli.say import say


class TrackerName(StrEnum):
    """The trackers there are."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"


Track = Annotated[
    list[TrackerName] | None,
    typer.Option("--track", help="Log the rounds into the run folder's track/ for that tool; repeatable."),
]


def trackers(track: Sequence[TrackerName] | None) -> list[str]:
    """The names, each of an installed library; else ModuleNotFoundError, which `extras.missing` tells as the extra."""
    if not track:
        return []
    from florana.track.tracking import require_trackers

    names = [one.value for one in track]
    require_trackers(names)
    return names


def note(line: str) -> None:
    """A line of a tracker that failed."""
    say(f"note: {line}", color="yellow", err=True)
