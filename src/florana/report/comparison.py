"""The page of a study: its table, and the pictures of score against bytes and error against score, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from florana.atomic_files import explained, replace_file
from florana.report.figures import COLOURS, MARKERS, STYLE, legend, not_too_close, svg_of
from florana.report.page import Picture, template, unique


@dataclass(frozen=True)
class Series:
    """One method's points in one setting: per seed a mapping with `score`, `bytes` and `error`, None where unknown."""

    setting: str
    method: str
    points: Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Further:
    """A further table of the page.

    Args:
        title: its heading.
        heads: of its columns.
        rows: as text, in the order of the heads.
        note: a sentence below it.
        words: how many columns hold words; the others are numbers.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: int = 3


def write_comparison(
    out: Path,
    *,
    title: str,
    summary: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    tables: Sequence[Further],
    series: Sequence[Series],
    swapped: Sequence[Series],
    metric: str,
    failures: Mapping[str, str],
    rates: str,
) -> Path:
    """Write the page. Raises FederationError where the file cannot be written."""
    pictures = []
    order = list(dict.fromkeys(one.method for one in (*series, *swapped)))
    for setting in dict.fromkeys(one.setting for one in series):
        own = [one for one in series if one.setting == setting]
        pictures += [
            Picture(
                f"Score against bytes: {setting}",
                "Final score of the global model against all bytes sent, both ways. Small: seeds. Large: their mean.",
                scatter(own, order, "bytes", "bytes of the whole run", metric, log=True),
            ),
            Picture(
                f"Error against score: {setting}",
                "Mean aggregation error over the rounds against the final score; exact methods stand at the left edge.",
                scatter(own, order, "error", "relative error of the aggregation, mean over rounds", metric, log=False),
            ),
        ]
    for setting in dict.fromkeys(one.setting for one in swapped):
        pictures.append(
            Picture(
                f"Fixed-updates ablation: {setting}",
                "The same clients' adapters given to every rule: error of the merge against the merged model's score.",
                scatter([one for one in swapped if one.setting == setting], order, "error",
                        "relative error of the aggregation", metric, log=False),
            )
        )  # fmt: skip
    shown_heads, shown_rows = without_gaps(heads, rows)
    page = template("comparison.html.j2").render(
        title=title,
        summary=summary,
        heads=shown_heads,
        rows=shown_rows,
        rates=rates,
        tables=[table for table in tables if table.rows],
        failures=sorted(failures.items()),
        pictures=[unique(picture, index) for index, picture in enumerate(pictures)],
    )
    with explained(out.parent, "the report could not be written", "try again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, page.encode())
    return out


def without_gaps(
    heads: Sequence[str], rows: Sequence[Sequence[str]], gap: str = "-"
) -> tuple[list[str], list[list[str]]]:
    """The table without the columns that hold nothing in any row.

    Args:
        heads: of the columns.
        rows: as text.
        gap: how nothing is written.

    Examples:
        >>> without_gaps(["method", "gap", "p"], [["a", "-", "-"], ["b", "-", "0.1"]])
        (['method', 'p'], [['a', '-'], ['b', '0.1']])
    """
    kept = [place for place in range(len(heads)) if any(row[place] != gap for row in rows)]
    return [heads[place] for place in kept], [[row[place] for place in kept] for row in rows]


def scatter(series: Sequence[Series], order: Sequence[str], x: str, xlabel: str, ylabel: str, *, log: bool) -> str:
    """Points of every seed, and each method's mean; a method's place in `order` gives it one colour in all pictures."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for one in series:
            index = order.index(one.method)
            known = [(p[x], p["score"]) for p in one.points if p.get(x) is not None and p.get("score") is not None]
            if not known:
                continue
            colour, marker = COLOURS[index % 8], MARKERS[(index + index // 8) % 8]
            xs, ys = zip(*known, strict=True)
            axes.scatter(xs, ys, s=20, color=colour, marker=marker, alpha=0.7, linewidths=0)
            axes.scatter([statistics.fmean(xs)], [statistics.fmean(ys)], s=64, color=colour, marker=marker,
                         label=one.method, edgecolors="white", linewidths=0.8)  # fmt: skip
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        not_too_close(axes, ylabel)
        legend(axes, "outside lower center", 8)
        return svg_of(figure)
