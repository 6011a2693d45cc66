"""The page: the template filled with the runs' tables and pictures, written in one step."""

from __future__ import annotations

import html
import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from florana.atomic_files import explained, replace_file
from florana.federation.best import LOWER_IS_BETTER
from florana.report import figures
from florana.report.seen import privacy_rows, seen_by_server
from florana.report.views import RunView, rows_note, summary, views
from florana.report.weights import weight_rows


@dataclass(frozen=True)
class Picture:
    """One figure of the page: its heading, what it shows in words (also for screen readers), its SVG."""

    title: str
    caption: str
    svg: str


def write_report(folders: Sequence[Path | str], out: Path | str, title: str = "") -> Path:
    """Write the report of the runs to `out`.

    Args:
        folders: run folders.
        out: the HTML file.
        title: the page's heading.

    Raises:
        InputError: a folder is not a run, or has no committed round.
        FederationError: the file cannot be written.
    """
    out = Path(out)
    runs = views([Path(folder) for folder in folders])
    page = render(runs, title or str(runs[0].recipe.get("title") or "florana report"))
    with explained(out.parent, "the report could not be written", "try again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, page.encode())
    return out


def render(runs: Sequence[RunView], title: str, above: str = "", every: int | None = None) -> str:
    """The page as text.

    Args:
        runs: one at least.
        title: its heading.
        above: HTML between the heading and the report.
        every: seconds after which a browser looks again; None for a page that stays.
    """
    rows = summary(runs)
    better = min if runs[0].score in LOWER_IS_BETTER else max
    measured = [row["global"] for row in rows if row["global"] is not None]
    return template("page.html.j2").render(
        title=title,
        above=above,
        every=every,
        runs=runs,
        rows=rows,
        best=better(measured) if measured else None,
        score=runs[0].score,
        personal=any(row["personal"] is not None or row["clients_on_common"] is not None for row in rows),
        seen=seen_by_server(runs),
        narrow=any(run.uplink != "float32" for run in runs),
        pictures=[unique(picture, index) for index, picture in enumerate(_pictures(runs))],
        settings=_settings(runs[0]),
        figures=list(dict.fromkeys(name for run in runs for name in run.figures)),
        refused=[(run.name, *entry) for run in runs for entry in run.refused],
    )


def template(name: str) -> jinja2.Template:
    """A template of this folder, with the filters for figures and the pages' common style."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "size": size, "seconds": seconds, "duration": duration}
    folder = importlib.resources.files("florana.report")
    environment.globals["style"] = folder.joinpath("style.css").read_text("utf-8")
    return environment.from_string(folder.joinpath(name).read_text("utf-8"))


def _pictures(runs: Sequence[RunView]) -> list[Picture]:
    score = runs[0].score
    pictures = []
    if any(run.scores("global") for run in runs):
        pictures.append(
            Picture(
                "Learning",
                f"The global model's {score} on the common test set, round by round.",
                figures.learning_curves(runs),
            )
        )
    elif any(run.losses for run in runs):
        pictures.append(
            Picture(
                "Training",
                "The clients' mean training loss, round by round: the server measures nothing itself.",
                figures.loss_curves(runs),
            )
        )
    inexact = [run for run in runs if figures.has_error(run) and not figures.is_exact(run)]
    personal = ", ".join(run.name for run in runs if not figures.has_error(run))
    exact = ", ".join(run.name for run in runs if figures.is_exact(run))
    if inexact:
        pictures.append(
            Picture(
                "Aggregation error",
                "How far the server's adapter is from the true average of the clients' updates, relative. "
                "Dashed: the best any adapter of that rank could do."
                + (f" Exact, so not drawn: {exact}." if exact else "")
                + (f" Without a figure (no global product, or sums alone): {personal}." if personal else ""),
                figures.error_curves(runs),
            )
        )
    narrow = [run for run in runs if run.uplink_errors]
    if narrow:
        pictures.append(
            Picture(
                "Error of the uplink",
                "How far the updates that the server got are from those the clients made, relative to these, "
                "as products over all modules; the mean over a round's clients. The aggregation's error is another.",
                figures.uplink_curves(narrow),
            )
        )
    if any(run.scores("global") for run in runs):
        pictures.append(
            Picture(
                "Bytes against score",
                "What each strategy had sent when it reached a score. Up and down, all clients, as serialised.",
                figures.bytes_against_score(runs),
            )
        )
    if any("train" in holds for holds in runs[0].setup["clients"].values()):  # secure sums hide the rows of sites
        pictures.append(Picture("Who holds what", "Training rows per client.", figures.partition(runs[0])))
    top = figures.largest_module_error(inexact)
    pictures += [
        Picture(
            f"Error by module: {run.name}",
            "Relative aggregation error of each adapted module in each round; one scale for all runs.",
            figures.error_by_module(run, top),
        )
        for run in inexact
    ]
    return pictures


def unique(picture: Picture, index: int) -> Picture:
    """Ids inside an SVG are shared by the whole page: give each picture its own."""
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>f{index}-", picture.svg)
    label = html.escape(f"{picture.title}. {picture.caption}")
    return Picture(picture.title, picture.caption, svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _settings(run: RunView) -> list[tuple[str, str]]:
    recipe, setup = run.recipe, run.setup
    model, data, parts, train, rounds = (recipe[k] for k in ("model", "data", "partition", "train", "federation"))
    asked = recipe.get("evaluate", {})
    length = f"{train['steps']} steps" if "steps" in train else f"{train['epochs']} epochs"
    return [
        ("Task", recipe["task"]),
        ("Base model", Path(model["base"]).name if model["base"].startswith("/") else model["base"]),
        (
            "LoRA",
            f"rank {model['rank']}, alpha {model['alpha']:g}{', rsLoRA' if model['rslora'] else ''}"
            + (", other ranks for " + ", ".join(model["rank_pattern"]) if model.get("rank_pattern") else "")
            + (", other alphas for " + ", ".join(model["alpha_pattern"]) if model.get("alpha_pattern") else "")
            + ", on "
            + (
                model["target_modules"]
                if isinstance(model["target_modules"], str)
                else ", ".join(model["target_modules"])
            ),
        ),
        *([("DoRA", _dora(model["magnitude"]))] if model.get("variant") == "dora" else []),
        ("Head", "averaged by the server" if model["head"] == "average" else "kept by each client"),
        ("Data", Path(data["train"]).name),
        *([("Long rows", rows_note(setup))] if rows_note(setup) else []),
        ("Partition", parts["kind"] + (f", alpha {parts['alpha']:g}" if parts["kind"] == "dirichlet" else "")),
        ("Local training", f"{length} of {train['batch_size']} rows, learning rate {train['learning_rate']:g}"),
        *([("Kept", f"the best round by {asked['by']} on the validation rows")] if asked.get("keep") == "best" else []),
        *weight_rows(run),
        *privacy_rows(run),
        *([("Uplink", rounds["uplink"])] if rounds.get("uplink", "float32") != "float32" else []),
        *([("Written", _written(recipe["generation"]))] if "generation" in recipe else []),
        ("Seed", str(recipe["seed"])),
    ]


def _written(own: Any) -> str:
    limit = f"the first {own['limit']} problems" if "limit" in own else "all problems"
    greedy = "greedy" if own["temperature"] == 0 else f"{own['samples']} samples at temperature {own['temperature']:g}"
    return f"{own['task']}, {limit}, {own['shots']} worked examples, {greedy}, {own['max_new_tokens']} tokens at most"


def _dora(magnitude: str) -> str:
    rule = "averaged with the clients' weights" if magnitude == "average" else "kept by each client"
    return f"magnitudes {rule}; the aggregation error is that of B A alone"


def number(value: float | None, digits: int = 4) -> str:
    """A figure with four digits, or a hyphen where there is none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def size(count: float) -> str:
    """Bytes in the largest fitting unit.

    Examples:
        >>> size(3 * 2**20)
        '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def seconds(value: float) -> str:
    """Seconds, in milliseconds below one.

    Examples:
        >>> seconds(0.0123)
        '12 ms'
    """
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def duration(value: float) -> str:
    """Seconds as a person says them.

    Examples:
        >>> duration(75), duration(8000)
        ('1 min 15 s', '2 h 13 min')
    """
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def to_json(folders: Sequence[Path]) -> str:
    """The summary rows as JSON."""
    return json.dumps(summary(views(folders)), indent=1)
