"""How a run stands, from its folder alone: what `florana watch` shows above the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florana.bounded import json_of
from florana.errors import InputError
from florana.federation.best import enough
from florana.federation.round_record import RoundRecord
from florana.report.views import shown
from florana.runs.run_folder import PROGRESS, at_work, read_run

TAIL_BYTES = 2**18
"""Of the end of progress.jsonl."""


@dataclass(frozen=True)
class Live:
    """How a run stands.

    Args:
        title: what it is called.
        round: the last committed round; 0 before the first.
        rounds: how many it will have.
        running: whether rounds are still to come.
        stopped: whether they are, and nobody is at work on them.
        answered: the clients of the last committed round.
        refused: client -> why it did not count there.
        now: what came in since then, one line for each event; of a federation over the network alone.
        seconds_left: at the pace of the last round; None where nobody knows.
        every: seconds after which the page looks again.
    """

    title: str
    round: int
    rounds: int
    running: bool
    stopped: bool
    answered: Sequence[str]
    refused: Mapping[str, str]
    now: Sequence[str]
    seconds_left: float | None
    every: int


def live_of(folder: Path, every: int) -> Live:
    """How the run in a folder stands.

    Args:
        folder: the run folder.
        every: seconds after which the page looks again.

    Raises:
        InputError: it is no run folder, or one that cannot be read.
    """
    if not (folder / "recipe.toml").exists() and (folder / PROGRESS).exists():
        stopped = at_work(folder) is False
        return Live("a federation", 0, 0, True, stopped, (), {}, _since_commit(folder), None, every)
    recipe, _, records = shown(read_run(folder))
    rounds, last = int(recipe["federation"]["rounds"]), records[-1] if records else None
    over = ended(recipe, records)
    done = last.round if last else 0
    stopped = not over and at_work(folder) is False
    pace = _pace(folder) if not over and not stopped else None
    return Live(
        title=str(recipe.get("title") or folder.resolve().name),
        round=done,
        rounds=rounds,
        running=not over,
        stopped=stopped,
        answered=last.clients if last else (),
        refused=last.refused if last else {},
        now=() if over else _since_commit(folder),
        seconds_left=pace * (rounds - done) if pace is not None else None,
        every=every,
    )


def ended(recipe: Mapping[str, Any], records: Sequence[RoundRecord]) -> bool:
    """Whether a run has all rounds that it will have: the last one, or those that its patience allows.

    Args:
        recipe: as its file has it.
        records: the committed rounds.
    """
    asked = recipe.get("evaluate", {})
    last = int(recipe["federation"]["rounds"])
    return len(records) >= last or enough(records, asked.get("by", "loss"), asked.get("patience"))


def _pace(folder: Path) -> float | None:
    """Seconds between the last two checkpoints."""
    times = [path.stat().st_mtime for path in sorted((folder / "checkpoint").glob("round-??????/state.json"))]
    return times[-1] - times[-2] if len(times) > 1 else None


def _since_commit(folder: Path) -> list[str]:
    """The events after the last committed round, as lines."""
    try:
        with (folder / PROGRESS).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
            raw = stream.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder / PROGRESS} cannot be read", why=str(error)) from None
    lines: list[str] = []
    for line in raw:
        try:
            event = shown(json_of(line))
            kind, client, detail = str(event["kind"]), str(event["client"]), str(event["detail"])
        except (ValueError, TypeError, KeyError):
            continue  # the first may be half a line, the last not yet whole
        if kind == "committed":
            lines = []
        elif kind == "round":
            lines.append(f"round {event.get('round')}: {detail} clients are asked")
        else:
            lines.append(" ".join(part for part in (kind, client, detail) if part))
    return lines[-50:]
