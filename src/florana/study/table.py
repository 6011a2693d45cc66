"""The table of a study: one row per method and setting, every figure with its own name, interval and paired difference.

Differences are from FedIT, paired by seed, with the p-value of the paired t-test. A cell that failed is a gap, and is
named.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from florana.federation.best import LOWER_IS_BETTER
from florana.report.views import RunView, view
from florana.study.estimates import Estimate, estimate, holm, paired
from florana.study.grid import Plan, recipe_of
from florana.study.runner import complete, folder_of

FIGURES = ("global", "personal", "gap", "clients_on_common")


@dataclass(frozen=True)
class Row:
    """One method in one setting. A figure is None where no seed has it.

    Args:
        setting: the name of the setting.
        method: the name of the method.
        seeds: how many seeds have a finished run.
        failed: seeds that have no finished run.
        scores: `global`, `personal`, `gap`, `clients_on_common` -> estimate.
        difference: of `global` from FedIT's, paired by seed.
        p_value: of that difference.
        first_error: the aggregation error of round 1.
        error: the mean of the aggregation error over rounds.
        optimum: the least error that the rank allows.
        bytes_up: bytes from all clients over a run, the mean over seeds.
        bytes_down: bytes to all clients over a run, the mean over seeds.
        server_seconds: time of the strategy's steps over a run, the mean over seeds.
        rounds_to_target: rounds until what FedIT ended with on the same seed; over the seeds that got there.
        bytes_to_target: bytes until then.
        reached: how many seeds reached the target.
        points: per seed, for the pictures: global score, bytes, first error.
    """

    setting: str
    method: str
    seeds: int
    failed: int
    scores: Mapping[str, Estimate]
    difference: Estimate | None
    p_value: float | None
    first_error: Estimate | None
    error: Estimate | None
    optimum: Estimate | None
    bytes_up: float
    bytes_down: float
    server_seconds: float
    rounds_to_target: float | None
    bytes_to_target: float | None
    reached: int
    points: Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Other:
    """Another figure of a method's last global models: GLUE's second one, the loss, the score of what was written."""

    setting: str
    method: str
    figure: str
    value: Estimate
    difference: Estimate | None
    p_value: float | None


@dataclass(frozen=True)
class Declared:
    """A comparison that the recipe declared before any score.

    Args:
        setting: the name of the setting.
        first: a method.
        second: the method it is compared with.
        difference: of the global scores, the first minus the second, paired by seed.
        p_value: of the paired t-test.
        adjusted: the same, corrected over all declared comparisons of all settings (Holm).
    """

    setting: str
    first: str
    second: str
    difference: Estimate | None
    p_value: float | None
    adjusted: float | None


@dataclass(frozen=True)
class Comparison:
    """A study's rows, their metric, FedIT's last score in each setting (mean over seeds), other figures, and the
    declared comparisons."""

    metric: str
    rows: Sequence[Row]
    targets: Mapping[str, float | None]
    start: float | None
    others: Sequence[Other]
    declared: Sequence[Declared] = ()

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON's own types."""
        return asdict(self)


def compare(plan: Plan, out: Path) -> Comparison:
    """The comparison of what is finished in a study's folder."""
    runs: dict[tuple[str, str], dict[int, RunView]] = {}
    for cell in plan.cells:
        folder = folder_of(out, cell)
        place = runs.setdefault((cell.setting.name, cell.method.label), {})
        if (folder / "rounds.jsonl").exists():
            run = view(folder, cell.method.label)
            if complete(recipe_of(plan.base, cell), run.records):
                place[cell.setting.seed] = run
    every = [run for place in runs.values() for run in place.values()]
    metric = every[0].score if every else "accuracy"
    targets = {
        setting: _mean([run.final("global") for run in place.values()])
        for (setting, method), place in runs.items()
        if method == "fedit"
    }
    seeds = len({setting.seed for setting in plan.settings})
    rows = [
        _row(setting, method, place, runs.get((setting, "fedit"), {}), metric, seeds)
        for (setting, method), place in runs.items()
    ]
    start = next((run.start for run in every if run.start is not None), None)
    return Comparison(metric, rows, targets, start, _others(runs, metric), _declared(plan, runs))


Runs = Mapping[tuple[str, str], Mapping[int, RunView]]
"""(setting, method) -> seed -> a finished run."""


def _declared(plan: Plan, runs: Runs) -> list[Declared]:
    found = []
    for setting in dict.fromkeys(setting.name for setting in plan.settings):
        for pair in plan.comparisons:
            first, second = (
                {seed: run.final("global") for seed, run in runs.get((setting, label), {}).items()} for label in pair
            )
            found.append(Declared(setting, *pair, *paired(first, second), None))
    adjusted = holm({str(index): one.p_value for index, one in enumerate(found)})
    return [replace(one, adjusted=adjusted[str(index)]) for index, one in enumerate(found)]


def _others(runs: Runs, metric: str) -> list[Other]:
    found = []
    for (setting, method), place in runs.items():
        figures = {seed: {name: last for name, (_, last) in run.figures.items()} for seed, run in place.items()}
        fedit = {seed: run.figures for seed, run in runs.get((setting, "fedit"), {}).items()}
        for name in dict.fromkeys(name for own in figures.values() for name in own if name != metric):
            values = {seed: own.get(name) for seed, own in figures.items()}
            reference = {seed: own[name][1] for seed, own in fedit.items() if name in own}
            value = estimate(list(values.values()))
            if value is not None:
                paired_with = paired(values, reference) if method != "fedit" else (None, None)
                found.append(Other(setting, method, name, value, *paired_with))
    return found


def _row(
    setting: str,
    method: str,
    runs: Mapping[int, RunView],
    reference: Mapping[int, RunView],
    metric: str,
    seeds: int,
) -> Row:
    difference, p_value = (None, None)
    if method != "fedit":
        difference, p_value = paired(
            {seed: run.final("global") for seed, run in runs.items()},
            {seed: run.final("global") for seed, run in reference.items()},
        )
    errors = {seed: [r.error["overall"] for r in run.records] for seed, run in runs.items()}
    # A seed's own target: partitions move every method, so the mean would be out of reach of some seeds, FedIT's too.
    targets = {seed: run.final("global") for seed, run in reference.items()}
    hits = [hit for seed, run in runs.items() if (hit := _first_at(run, targets.get(seed), metric)) is not None]
    scores = {figure: found for figure in FIGURES if (found := estimate([r.final(figure) for r in runs.values()]))}
    return Row(
        setting=setting,
        method=method,
        seeds=len(runs),
        failed=seeds - len(runs),
        scores=scores,
        difference=difference,
        p_value=p_value,
        first_error=estimate([values[0] for values in errors.values()]),
        error=estimate([_mean(values) for values in errors.values()]),
        optimum=estimate([_mean([r.error["optimum"] for r in run.records]) for run in runs.values()]),
        bytes_up=_mean([sum(r.bytes_up for r in run.records) for run in runs.values()]) or 0.0,
        bytes_down=_mean([sum(r.bytes_down for r in run.records) for run in runs.values()]) or 0.0,
        server_seconds=_mean([sum(r.server_seconds for r in run.records) for run in runs.values()]) or 0.0,
        rounds_to_target=_mean([float(round_) for round_, _ in hits]),
        bytes_to_target=_mean([float(total) for _, total in hits]),
        reached=len(hits),
        points=[
            {
                "seed": float(seed),
                "score": run.final("global"),
                "bytes": float(sum(r.bytes_up + r.bytes_down for r in run.records)),
                "error": _mean(errors[seed]),
            }
            for seed, run in sorted(runs.items())
        ],
    )


def _first_at(run: RunView, target: float | None, metric: str) -> tuple[int, int] | None:
    """(round, bytes so far) of the first measured round that is as good as the target."""
    if target is None:
        return None
    for round_, value in run.scores("global"):
        if (value <= target) if metric in LOWER_IS_BETTER else (value >= target):
            return round_, run.bytes_so_far[round_]
    return None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
