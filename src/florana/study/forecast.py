"""What a study would do, before it does anything: its runs with bytes and time, after a few measured steps of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from florana.runs.dry_run import plan as plan_run
from florana.runs.prepared import Setup, prepare
from florana.runs.threads import threads
from florana.study.grid import Plan, recipe_of
from florana.study.runner import prepared_by, rounds_left_of
from florana.study.tune import grid_of, jobs_of, rounds_of


@dataclass(frozen=True)
class Forecast:
    """The runs of one method in one setting, over all seeds.

    Args:
        setting: its name.
        method: its label.
        runs: how many seeds.
        rounds_left: of all of them, not committed yet.
        bytes_up: of one run, all clients.
        bytes_down: of one run, all clients; methods with a frozen part send more as it grows.
        seconds: of what is left, one run after the other.
    """

    setting: str
    method: str
    runs: int
    rounds_left: int
    bytes_up: int
    bytes_down: int
    seconds: float


def forecast(plan: Plan, out: Path) -> list[Forecast]:
    """A line for each method and setting. Models are loaded and a few steps are measured; nothing is written.

    Args:
        plan: the study.
        out: its folder, where some of it may be done already.

    Raises:
        InputError: model or data unusable.
    """
    found: list[Forecast] = []
    shared: dict[str, Setup] = {}
    for method in plan.methods:
        for name in dict.fromkeys(setting.name for setting in plan.settings):
            cells = [c for c in plan.cells if c.method == method and c.setting.name == name]
            recipe = recipe_of(plan.base, cells[0])
            with threads(recipe.threads):
                key = prepared_by(recipe)
                if key not in shared:
                    shared[key] = prepare(recipe)
                one = plan_run(recipe, shared[key])
            rounds = recipe.federation.rounds
            left = sum(rounds_left_of(plan, out, cell) for cell in cells)
            found.append(
                Forecast(
                    setting=name,
                    method=method.label,
                    runs=len(cells),
                    rounds_left=left,
                    bytes_up=rounds * one.bytes_up,
                    bytes_down=rounds * one.bytes_down,
                    seconds=one.seconds * left / rounds,
                )
            )
    return [*_of_tuning(plan, out, found), *found]


def _of_tuning(plan: Plan, out: Path, runs: Sequence[Forecast]) -> list[Forecast]:
    """A line for each tuning, at the pace of its method's runs; what is done of it is not taken off."""
    found = []
    for job in jobs_of(plan, out, 1):
        one = next(line for line in runs if (line.setting, line.method) == (job.setting.name, job.method.label))
        rounds, number = rounds_of(job), len(grid_of(plan, job.method)) * plan.tune_seeds
        pace = one.seconds / one.rounds_left if one.rounds_left else 0.0
        whole = plan.base.federation.rounds
        found.append(Forecast(one.setting, f"tuning of {one.method}", number, rounds, one.bytes_up // whole * rounds
                              // number, one.bytes_down // whole * rounds // number, pace * rounds))  # fmt: skip
    return found
