"""The table of a study: one row per method and setting, every figure with its own name, interval and paired difference.

Differences are from FedIT, paired by seed, with the p-value of the paired t-test. A cell that failed is a gap, and is
named.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from florana.report.views import LOWER_IS_BETTER, RunView, view
from florana.study.estimates import Estimate, estimate, paired
from florana.study.grid import Plan
from florana.study.runner import folder_of

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
class Comparison:
    """A study's rows, their metric, FedIT's last score in each setting (mean over seeds), other figures."""

    metric: str
    rows: Sequence[Row]
    targets: Mapping[str, float | None]
    start: float | None
    others: Sequence[Other]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON's own types."""
        return asdict(self)


def compare(plan: Plan, out: Path) -> Comparison:
    """The comparison of what is finished in a study's folder."""
    rounds = plan.base.federation.rounds
    runs: dict[tuple[str, str], dict[int, RunView]] = {}
    for cell in plan.cells:
        folder = folder_of(out, cell)
        place = runs.setdefault((cell.setting.name, cell.method.label), {})
        if (folder / "rounds.jsonl").exists():
            run = view(folder, cell.method.label)
            if len(run.records) >= rounds:
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
    return Comparison(metric, rows, targets, start, _others(runs, metric))


Runs = Mapping[tuple[str, str], Mapping[int, RunView]]
"""(setting, method) -> seed -> a finished run."""


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


HEADS = ["setting", "method", "global", "minus fedit", "p", "personal", "gap", "clients on common", "error, round 1",
         "error, mean", "optimum", "MB up", "MB down", "server s", "rounds to target", "seeds"]  # fmt: skip


def cells_of(row: Row, sign: str = "±") -> list[str]:
    """The row as text, in the order of HEADS."""
    seeds = f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else "")
    return [
        row.setting,
        row.method,
        *(_text(row.scores.get(figure), sign) for figure in ("global",)),
        _text(row.difference, sign, plus=True),
        "-" if row.p_value is None else f"{row.p_value:.3f}",
        *(_text(row.scores.get(figure), sign) for figure in ("personal", "gap", "clients_on_common")),
        *("-" if found is None else f"{found.mean:.4f}" for found in (row.first_error, row.error, row.optimum)),
        f"{row.bytes_up / 1e6:.2f}",
        f"{row.bytes_down / 1e6:.2f}",
        f"{row.server_seconds:.2f}",
        "-" if row.rounds_to_target is None else f"{row.rounds_to_target:.1f} ({row.reached}/{row.seeds})",
        seeds,
    ]


def _text(found: Estimate | None, sign: str, *, plus: bool = False) -> str:
    if found is None:
        return "-"
    mean = f"{found.mean:+.4f}" if plus else f"{found.mean:.4f}"
    if found.low is not None and found.high is not None:
        low, high = (f"{value:+.4f}" if plus else f"{value:.4f}" for value in (found.low, found.high))
        return f"{mean} ({low} to {high})"
    return mean if found.half is None else f"{mean} {sign} {found.half:.4f}"


OTHER_HEADS = ["setting", "method", "figure", "mean", "minus fedit", "p", "seeds"]


def other_cells(one: Other, sign: str = "±") -> list[str]:
    """The figure as text, in the order of OTHER_HEADS."""
    p_value = "-" if one.p_value is None else f"{one.p_value:.3f}"
    mean, difference = _text(one.value, sign), _text(one.difference, sign, plus=True)
    return [one.setting, one.method, one.figure, mean, difference, p_value, str(one.value.seeds)]


def markdown(comparison: Comparison) -> str:
    """The table as Markdown, and that of the other figures."""
    text = _markdown(HEADS, [cells_of(row) for row in comparison.rows], 2)
    if comparison.others:
        text += "\n" + _markdown(OTHER_HEADS, [other_cells(one) for one in comparison.others], 3)
    return text


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * words + "---:|" * (len(heads) - words)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


def latex(comparison: Comparison) -> str:
    """The table as a LaTeX tabular (booktabs)."""

    def escaped(text: str) -> str:
        return text.replace("_", r"\_").replace("&", r"\&").replace("%", r"\%").replace("±", r"$\pm$")

    lines = [r"\begin{tabular}{ll" + "r" * (len(HEADS) - 2) + "}", r"\toprule"]
    lines.append(" & ".join(escaped(head) for head in HEADS) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(escaped(cell) for cell in cells_of(row)) + r" \\" for row in comparison.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line per row, every number on its own: means, half widths, seeds."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = ["setting", "method", "seeds", "failed"]
    figures = [*FIGURES, "difference", "first_error", "error", "optimum"]
    plain = ["p_value", "bytes_up", "bytes_down", "server_seconds", "rounds_to_target", "bytes_to_target", "reached"]
    writer.writerow([*names, *(f"{figure}{end}" for figure in figures for end in ("", "_half_width")), *plain])
    for row in comparison.rows:
        found = [row.scores.get(figure) if figure in FIGURES else getattr(row, figure) for figure in figures]
        numbers = [x for one in found for x in ((one.mean, one.half) if one else (None, None))]
        writer.writerow([*(getattr(row, name) for name in names), *numbers, *(getattr(row, name) for name in plain)])
    return out.getvalue()
