"""The report's pictures, as SVG text. Readable in black and white: every series has its own marker and line."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from florana.federation.best import LOWER_IS_BETTER
from florana.report.views import RunView

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
EXACT = 1e-6
"""Below this relative error an aggregation is exact to the rounding of float32."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GRID, INK = "#e6e6e6", "#000000"
"""What the page's own colours take the place of: dark lines and text are light ones on a dark page."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "florana",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def learning_curves(runs: Sequence[RunView]) -> str:
    """Score of the global model by round; the dotted line is the starting model."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            series = run.scores("global")
            if run.start is not None:
                series = [(0, run.start), *series]
            _line(axes, series, index, run.name)
        if runs[0].start is not None:
            axes.axhline(runs[0].start, color="#666666", linestyle=":", linewidth=1)
            axes.annotate(
                "starting model",
                (0.99, runs[0].start),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color="#666666",
                fontsize=9,
            )
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(f"{runs[0].score} on the common test set")
        not_too_close(axes, runs[0].score)
        legend(axes)
        return svg_of(figure)


def loss_curves(runs: Sequence[RunView]) -> str:
    """The clients' mean training loss by round: what a server knows that measures nothing itself."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            _line(axes, run.losses, index, run.name)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("training loss, mean over the clients")
        legend(axes)
        return svg_of(figure)


LEAST_SPAN = 0.1


def not_too_close(axes: Any, score: str) -> None:
    """A scale of a tenth at least, for scores between 0 and 1: closer, noise looks like a difference."""
    low, high = axes.get_ylim()
    if score not in LOWER_IS_BETTER and high - low < LEAST_SPAN:
        middle = (low + high) / 2
        axes.set_ylim(middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2)


def has_error(run: RunView) -> bool:
    """Whether the run's aggregations have an error to speak of; personal methods have no global product to err in."""
    return any(record.error["overall"] is not None for record in run.records)


def is_exact(run: RunView) -> bool:
    """Whether every aggregation of the run was exact to rounding: nothing to draw."""
    return has_error(run) and all((record.error["overall"] or 0.0) < EXACT for record in run.records)


def error_curves(runs: Sequence[RunView]) -> str:
    """Relative aggregation error by round, log scale; dashed: the optimum at that rank. Exact runs are left out."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            if is_exact(run) or not has_error(run):
                continue
            error = [(r.round, max(r.error["overall"] or 0.0, EXACT)) for r in run.records]
            best = [(r.round, max(r.error["optimum"] or 0.0, EXACT)) for r in run.records]
            _line(axes, error, index, run.name)
            axes.plot(*zip(*best, strict=True), color=COLOURS[index % 8], linestyle="--", linewidth=1, alpha=0.7)
        _errors_by_round(axes, "relative error of the aggregation")
        legend(axes)
        return svg_of(figure)


def uplink_curves(runs: Sequence[RunView]) -> str:
    """Relative error that the format of the uplink adds to the clients' updates, by round, log scale."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            series = [(round_, max(error, EXACT)) for round_, error in run.uplink_errors]
            _line(axes, series, index, f"{run.name}, {run.uplink}")
        _errors_by_round(axes, "relative error of the uplink")
        legend(axes)
        return svg_of(figure)


def _errors_by_round(axes: Any, what: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(what)


def error_by_module(run: RunView, top: float) -> str:
    """Relative aggregation error of every module (rows) in every round (columns); `top` is the scale's end."""
    modules = list(run.records[-1].error["per_module"])
    values = [[r.error["per_module"][m]["error"] or 0.0 for r in run.records] for m in modules]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(7.2, 1.1 + 0.2 * len(modules)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0.0, vmax=top, interpolation="nearest")
        axes.set_xticks(*_ticks([r.round for r in run.records]))
        axes.set_yticks(range(len(modules)), [_plain(_short(name)) for name in modules], fontsize=8)
        axes.set_xlabel("round")
        figure.colorbar(image, ax=axes, label="relative error")
        return svg_of(figure)


def largest_module_error(runs: Sequence[RunView]) -> float:
    """The common end of the scale of the runs' module pictures."""
    return max(
        (m["error"] or 0.0 for run in runs for r in run.records for m in r.error["per_module"].values()),
        default=1.0,
    )


def bytes_against_score(runs: Sequence[RunView]) -> str:
    """Score of the global model against all bytes sent up to that round, both ways and all clients."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            sent = run.bytes_so_far
            _line(axes, [(sent[r] / 2**20, value) for r, value in run.scores("global")], index, run.name)
        not_too_close(axes, runs[0].score)
        axes.set_xlabel("MiB sent, up and down, all clients")
        axes.set_ylabel(f"{runs[0].score} on the common test set")
        legend(axes)
        return svg_of(figure)


def partition(run: RunView) -> str:
    """Who holds what: training rows per client, by label where there are labels."""
    clients = dict(sorted(run.setup["clients"].items(), reverse=True))
    labels = run.setup["labels"]
    shown = 40
    names = list(clients)[-shown:]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.2 + 0.27 * len(names) + 0.2 * (len(labels) // 4)), layout="constrained")
        axes = figure.subplots()
        if labels and all(clients[name].get("per_label") for name in names):  # sites need not tell them
            left = [0] * len(names)
            for index, label in enumerate(labels):
                counts = [clients[name]["per_label"][index] for name in names]
                axes.barh(
                    [_plain(name) for name in names],
                    counts,
                    left=left,
                    label=_plain(str(label)),
                    color=_shade(index, len(labels)),
                    edgecolor="white",
                    linewidth=0.5,
                )
                left = [a + b for a, b in zip(left, counts, strict=True)]
            columns = min(len(labels), 4)
            figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
        else:
            axes.barh(
                [_plain(name) for name in names], [clients[name].get("train", 0) for name in names], color=COLOURS[0]
            )
        axes.set_xlabel("training rows" + (f" (first {shown} clients)" if len(clients) > shown else ""))
        axes.grid(axis="y", visible=False)
        return svg_of(figure)


def _plain(name: str) -> str:
    """A name as letters: two dollars would be read as a formula."""
    return name.replace("$", r"\$")


def _line(axes: Any, series: Sequence[tuple[float, float]], index: int, name: str) -> None:
    if series:
        axes.plot(
            *zip(*series, strict=True),
            color=COLOURS[index % 8],
            marker=MARKERS[index % 8],
            markersize=5,
            linewidth=1.6,
            label=_plain(name),
        )


def legend(axes: Any, place: str = "outside upper center", size: float = 10) -> None:
    """The names of the series beside the axes, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = max(1, min(len(labels), 4, int(800 / size) // (8 + max(map(len, labels)))))
        axes.figure.legend(handles, labels, loc=place, ncols=columns, fontsize=size, frameon=False)


def _ticks(rounds: Sequence[int]) -> tuple[list[int], list[str]]:
    every = max(1, len(rounds) // 12)
    places = list(range(0, len(rounds), every))
    return places, [str(rounds[place]) for place in places]


def _shade(index: int, count: int) -> Any:
    return matplotlib.colormaps["tab20"](index % 20) if count > 8 else COLOURS[index % 8]


def _short(module: str) -> str:
    """A module's name from its layer's number on: `encoder.layer.3.self.query` -> `3.self.query`."""
    parts = module.split(".")
    first = max((place for place, part in enumerate(parts) if part.isdigit()), default=max(len(parts) - 2, 0))
    return ".".join(parts[first:])


def svg_of(figure: Figure) -> str:
    """The figure as an SVG element, the same bytes at any time."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace(GRID, f"var(--grid, {GRID})")
