"""What a person sees while a run goes on, and the tables after it. Without a terminal: one line per round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from florana.displayable import displayable
from florana.federation.event import Event
from florana.federation.round_record import RoundRecord
from florana.report.page import duration, number, seconds, size
from florana.report.views import rows_note

if TYPE_CHECKING:
    from florana.adapters.merge_card import Merged
    from florana.report.views import RunView
    from florana.runs.dry_run import Plan


class Screen:
    """Progress of one run: a bar over all optimizer steps on a terminal, a line per committed round elsewhere.

    Args:
        console: where to draw; None for silence (`--json`).
        name: the run's name in front of every line.
        steps: all optimizer steps of the run, for the bar's length.
        figures: which figures of the global model a round's line shows, where the round has them.
        done: the steps of rounds that an earlier sitting committed.
    """

    def __init__(
        self,
        console: Console | None,
        name: str,
        steps: int,
        figures: Sequence[str] = ("accuracy", "loss"),
        done: int = 0,
    ) -> None:
        self._console, self._name, self._figures = console, name, figures
        self._progress: Progress | None = None
        self._round = ""
        if console is not None and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task(name, total=steps, completed=done, note="")

    def __enter__(self) -> Screen:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def named(self, name: str) -> Screen:
        """The same screen for the next run of several."""
        self._name = name
        return self

    def step(self, client: str) -> None:
        """One optimizer step was done."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, note=displayable(f"{self._name} {self._round} {client}", 80))

    def show(self, event: Event) -> None:
        """A round began or ended, or an update was refused."""
        if event.kind == "round":
            self._round = f"round {event.round}"
        if self._console is None:
            return
        client, detail = displayable(event.client, 100), displayable(event.detail, 1000)
        if event.kind == "refused":
            line = f"{self._name}  round {event.round}: refused {client}: {detail}"
            self._console.print(line, style="yellow", highlight=False)
        elif event.kind in ("joined", "back"):
            self._console.print(
                f"{client} is {'here' if event.kind == 'joined' else 'back'}: {detail}", highlight=False
            )
        elif event.kind == "told":
            self._console.print(f"{client} {detail}", highlight=False)
        elif event.kind in ("repaired", "resumed", "ended"):
            self._console.print(event.detail, style="yellow", highlight=False)
        elif event.kind == "committed" and event.record is not None:
            self._console.print(f"{self._name}  {_round_line(event.record, self._figures)}", highlight=False)


def _round_line(record: RoundRecord, figures: Sequence[str]) -> str:
    parts = [f"round {record.round:>3}", f"{len(record.clients)} clients"]
    if record.train_loss is not None:
        parts.append(f"train loss {record.train_loss:.3f}")
    for name in figures:
        if name in record.eval.get("global", {}):
            parts.append(f"global {name} {record.eval['global'][name]:.4f}")
    if record.error["overall"] is not None:
        parts.append(f"error {number(record.error['overall'])} (optimum {number(record.error['optimum'])})")
    if record.error.get("uplink") is not None:
        parts.append(f"uplink error {number(record.error['uplink'])}")
    return "  ".join(parts)


@contextmanager
def counting(console: Console | None, name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over things that are counted: yields what to call with (done, of how many). Silent without a terminal."""
    if console is None or not console.is_terminal:
        yield lambda count, total: None
        return
    title = TextColumn("{task.description}", style="bold", markup=False)
    columns = (title, BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield lambda count, total: progress.update(task, completed=count, total=total)


def merge_table(merged: Merged) -> Table:
    """What a merge did."""
    table = Table(title=f"Merged by {merged.method}", title_justify="left")
    for column in ("adapter", "weight", "rank"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for source in merged.sources:
        table.add_row(source.name, number(source.weight), ", ".join(map(str, source.ranks)))
    return table


def merge_line(merged: Merged) -> str:
    """How exact a merge is, in one line."""
    if merged.error < 1e-6:
        return f"rank {merged.rank}: exact to rounding (relative error {merged.error:.1e})"
    return (
        f"rank {merged.rank}: relative error {number(merged.error)} against the exact weighted sum; "
        f"the least any adapter of that rank has: {number(merged.optimum)}"
    )


def summary_table(rows: Sequence[dict[str, Any]], title: str, width: int = 120) -> Table:
    """The strategies side by side: a row each, or a column each where the screen is narrow."""
    heads = ["strategy", f"{rows[0]['metric']}: start", "global", "personal", "gap", "error", "optimum"]
    heads += ["up", "down", "server"]
    lines = [
        [
            row["strategy"],
            *(number(row[key]) for key in ("start", "global", "personal", "gap", "error", "optimum")),
            size(row["bytes_up"]),
            size(row["bytes_down"]),
            seconds(row["server_seconds"]),
        ]
        for row in rows
    ]
    cells = [heads, *lines]
    if width < 120:
        cells = [list(column) for column in zip(*cells, strict=True)]
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(cells[0]):
        table.add_column(head, justify="right" if index else "left")
    for line in cells[1:]:
        table.add_row(*line)
    return table


def figures_table(runs: Sequence[RunView]) -> Table | None:
    """Every figure of the global models, the start beside the last one; None where the summary shows all there is."""
    if not any(len(run.figures) > 2 for run in runs):
        return None
    table = Table(title="The global model's figures: start, last", title_justify="left")
    table.add_column("strategy")
    names = list(dict.fromkeys(name for run in runs for name in run.figures))
    for name in names:
        table.add_column(name, justify="right")
    for run in runs:
        pairs = [run.figures.get(name, (None, None)) for name in names]
        table.add_row(run.name, *(f"{number(first)}, {number(last)}" for first, last in pairs))
    return table


def plan_table(plan: Plan) -> Table:
    """The plan of a run, one fact a line."""
    table = Table(show_header=False, title="Plan: nothing was written", title_justify="left")
    table.add_column()
    table.add_column()
    sizes = sorted(plan.clients.values())
    rows = [
        ("strategy", plan.strategy),
        ("rounds", f"{plan.rounds}, {plan.per_round} of {len(plan.clients)} clients each"),
        ("training", ", ".join(f"{key} {value}" for key, value in plan.training.items())),
        ("training rows", f"{sum(sizes)} in all; {sizes[0]} to {sizes[-1]} per client"),
        *(
            (f"  {client}", f"{rows} to train on, {plan.own_test[client]} own test")
            for client, rows in list(plan.clients.items())[:20]
        ),
        ("common test set", f"{plan.common_test} rows"),
        *([("long rows", long_rows)] if (long_rows := rows_note(plan.to_json())) else []),
        *([("written", _writing(plan))] if plan.writing is not None else []),
        *([("privacy", _noise(plan))] if plan.noise else []),
        ("trained parameters", f"{plan.trainable_parameters} on a base of {plan.base_parameters}"),
        ("bytes per round", f"{size(plan.bytes_up)} up, {size(plan.bytes_down)} down, all clients"),
        ("memory", size(plan.memory) + " (peak after one step)" if plan.memory else "unknown"),
        (
            "time",
            f"about {duration(plan.seconds)} ({plan.seconds_per_step * 1000:.0f} ms a step, "
            f"{plan.steps:g} steps per client and round)",
        ),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _noise(plan: Plan) -> str:
    most, least = max(plan.noise.values()), min(plan.noise.values())
    return f"{plan.budget}; noise of {least:g}" + (f" to {most:g}" if most > least else "") + " times the clip"


def _writing(plan: Plan) -> str:
    own = plan.writing
    assert own is not None
    return (
        f"{own.task}: {own.problems} problems, {own.samples} each, {own.times} times in the run"
        + (f"; {own.cut_prompts} prompts lose their beginning" if own.cut_prompts else "")
        + f"; up to {duration(own.seconds)} (in the time below, without running programs)\nfigures: "
        + ", ".join(own.figures)
    )
