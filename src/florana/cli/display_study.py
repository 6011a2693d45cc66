"""What a person sees of a study, and of the plan of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
from florana.report.page import duration, size

if TYPE_CHECKING:
    from florana.runs.cost_model import ModelPlan
    from florana.study.forecast import Forecast
    from florana.study.table import Comparison


@contextmanager
def study_progress(console: Console | None, rounds: int) -> Iterator[Callable[[int, str], None]]:
    """A bar over all rounds of a study with the time left; without a terminal, a line each tenth of the way."""
    if console is None:
        yield lambda count, name: None
        return
    if not console.is_terminal:
        done = 0

        def say(count: int, name: str) -> None:
            nonlocal done
            before, done = done, done + count
            if rounds and done * 10 // rounds > before * 10 // rounds:
                console.print(f"{done} of {rounds} rounds", highlight=False)

        yield say
        return
    columns = (TextColumn("comparing", style="bold"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[name]}", markup=False),
                  console=console, transient=True) as progress:  # fmt: skip
        task = progress.add_task("", total=rounds, name="")
        yield lambda count, name: progress.update(task, advance=count, name=displayable(name, 80))


def forecast_table(lines: Sequence[Forecast]) -> Table:
    """What a study would do: a line for each method and setting, and the sum."""
    table = Table(title="Plan of the study: nothing was written", title_justify="left")
    several = len({line.setting for line in lines}) > 1
    for name in ["setting", "method"] if several else ["method"]:
        table.add_column(name, overflow="fold")
    for head in ("runs", "rounds left", "up, a run", "down, a run", "time left"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in lines:
        sizes = (size(line.bytes_up), size(line.bytes_down))
        left = (str(line.runs), str(line.rounds_left), *sizes, duration(line.seconds))
        table.add_row(*([line.setting] if several else []), line.method, *left)
    table.add_section()
    whole = duration(sum(line.seconds for line in lines))
    runs, rounds = (str(sum(values)) for values in ([x.runs for x in lines], [x.rounds_left for x in lines]))
    table.add_row(*(["all"] if several else []), "one after the other", runs, rounds, "", "", whole)
    return table


def study_table(comparison: Comparison, width: int) -> Table:
    """The study's rows; on a narrow screen the figures a reader looks at first."""
    from florana.study.formats import HEADS, cells_of

    chosen = list(range(len(HEADS))) if width >= 190 else [0, 1, 2, 3, 4, 5, 8, 10, len(HEADS) - 1]
    chosen = chosen if width >= 100 else [1, 2, 3, 8]
    if len({row.setting for row in comparison.rows}) == 1:
        chosen = [index for index in chosen if index != 0]
    table = Table(
        title=f"{comparison.metric}, mean ± half the 95 % interval over seeds (of two seeds their range)",
        title_justify="left",
    )
    for index in chosen:
        table.add_column(HEADS[index], justify="left" if index < 2 else "right", no_wrap=index == 1)
    for row in comparison.rows:
        cells = cells_of(row)
        table.add_row(*(cells[index] for index in chosen))
    return table


def others_table(comparison: Comparison) -> Table | None:
    """The other figures of the global models; None where there is no other than the loss."""
    from florana.study.formats import OTHER_HEADS, other_cells

    found = [one for one in comparison.others if one.figure != "loss"]
    if not found:
        return None
    settings = len({one.setting for one in found}) > 1
    table = Table(title="other figures of the global models", title_justify="left")
    for index, head in enumerate(OTHER_HEADS):
        if index or settings:
            table.add_column(head, justify="left" if index < 3 else "right", no_wrap=index == 1)
    for one in found:
        table.add_row(*other_cells(one)[0 if settings else 1 :])
    return table


def model_plan_table(plan: ModelPlan) -> Table:
    """One line per method: what travels in float32, and what client and server hold."""
    table = Table(
        title=f"{plan.model}: {plan.parameters / 1e6:,.0f} M parameters, {plan.modules} modules adapted, rank "
        f"{plan.rank}, {plan.clients} clients a round (float32 on the wire, heads not counted)",
        title_justify="left",
    )
    for head in ("method", "up", "down, round 2", "down, at most", "of FedIT, late", "client holds", "server holds"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for line in plan.lines:
        ratio = f"{line.against_fedit:.2f}" if line.against_fedit < 100 else f"{line.against_fedit:,.0f}"
        sizes = [size(4 * number) for number in (line.up, line.down, line.down_late)]
        table.add_row(line.method, *sizes, ratio, size(line.client), size(line.server))
    return table
