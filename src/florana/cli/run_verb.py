"""The verb `run`: a recipe into a run folder, or on with a run that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florana.cli.interrupted import interruptible, safe
from florana.cli.track_option import Track, note, trackers
from florana.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from florana.recipe.schema import Recipe
    from florana.runs.prepared import Setup

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; with --resume the run folder alone will do.")],
    out: Annotated[Path | None, typer.Option(help="A new folder for the run. Default: runs/<recipe's name>.")] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and end.")] = False,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Run a recipe, round by round, into a run folder.

    Example: florana run recipes/sst2-minilm.toml --out runs/sst2 --set federation.rounds=4
    """
    from florana.recipe.load import read_recipe

    recipe, folder = _places(recipe, out, resume)
    resolved = read_recipe(recipe, assign or [])
    from florana.cli.console import console_of

    console = console_of(as_json)
    if dry_run:
        _print_plan(resolved, console)
        return
    from florana.runs.run_folder import check_folder

    check_folder(resolved, folder, resume)
    names = trackers(track)
    from florana.cli.display import Screen, figures_table, summary_table
    from florana.federation.journal import read_records
    from florana.recipe.privacy_words import privacy_said, spent_in
    from florana.report.page import write_report
    from florana.report.views import rows_note, shown_figures, summary, views
    from florana.runs.prepared import prepare
    from florana.runs.rounds import settled
    from florana.runs.setup import execute
    from florana.strategy.custom import plain_name
    from florana.track.tracking import tracked

    with settled(resolved, folder) as own:
        if console:
            what = f"loading {own.model.base} and {own.data.train}, threads {own.threads}"
            console.print(what, highlight=False, soft_wrap=True)
        setup = prepare(own)
    if console and rows_note(setup.partition):
        console.print(rows_note(setup.partition), highlight=False)
    shown = shown_figures(resolved.model_dump())
    name, steps = plain_name(resolved.strategy["name"]), _steps(resolved, setup)
    done = steps * len(read_records(folder / "rounds.jsonl")) // resolved.federation.rounds
    with (
        interruptible(lambda: f"{safe([folder])}; go on with: florana run --resume {folder}") as interrupted_before,
        Screen(console, name, steps, shown, done) as screen,
        tracked(folder, names, screen.show, note) as show,
    ):

        def stepped(client: str) -> None:
            interrupted_before()
            screen.step(client)

        execute(resolved, folder, setup=setup, resume=resume, show=show, step=stepped)
    report = write_report([folder], folder / "report.html")
    rows = summary(views([folder]))
    if as_json:
        typer.echo(json.dumps({**rows[0], "run": str(folder), "report": str(report)}, indent=1))
    elif console:
        console.print(summary_table(rows, resolved.title or recipe.stem, console.width))
        if (more := figures_table(views([folder]))) is not None:
            console.print(more)
        if resolved.privacy.unit is not None:
            spent = spent_in([record.notes for record in read_records(folder / "rounds.jsonl")])
            said = privacy_said(resolved.privacy.model_dump(), spent, simulated=True)
            console.print(f"hidden: {said}", highlight=False, soft_wrap=True)
        console.print(
            f"run: {folder}\nadapter: {folder / 'adapter'}{_kept(resolved, folder)}\nreport: {report}",
            highlight=False,
            soft_wrap=True,
        )


def _places(recipe: Path, out: Path | None, resume: bool) -> tuple[Path, Path]:
    """(the recipe's file, the run folder): a run folder is named in the place of its recipe to go on with it."""
    if not recipe.is_dir():
        return recipe, out or Path("runs") / recipe.stem
    if not (recipe / "recipe.toml").exists():
        raise RecipeError(f"{recipe} is no recipe and no run folder", fix="give a TOML file, or the folder of a run")
    if out is not None and out.resolve() != recipe.resolve():
        raise RecipeError(f"{recipe} is a run folder, and --out names another", fix="leave --out out")
    if not resume:
        raise RecipeError(f"{recipe} is a run folder", fix=f"go on with it: florana run --resume {recipe}")
    return recipe / "recipe.toml", recipe


def _print_plan(recipe: Recipe, console: Console | None) -> None:
    from florana.cli.display import plan_table
    from florana.runs.dry_run import plan as plan_run
    from florana.runs.prepared import prepare
    from florana.runs.threads import threads

    with threads(recipe.threads):
        result = plan_run(recipe, prepare(recipe))
    if console:
        console.print(plan_table(result))
    else:
        typer.echo(json.dumps(result.to_json(), indent=1))


def _kept(recipe: Recipe, folder: Path) -> str:
    """Which round's adapter it is, where that need not be the last."""
    from florana.federation.best import up_to_kept
    from florana.federation.journal import read_records

    if recipe.evaluate.keep != "best":
        return ""
    kept = up_to_kept(recipe.model_dump(), read_records(folder / "rounds.jsonl"))
    return f" (of round {kept[-1].round}, the best by {recipe.evaluate.by} on the validation rows)"


def _steps(recipe: Recipe, setup: Setup) -> int:
    from florana.train.client import steps_per_round

    rows = [len(data.bins) for data in setup.clients.values()]
    mean = sum(steps_per_round(recipe.train, count) for count in rows) / len(rows)
    return round(recipe.federation.rounds * (recipe.federation.clients_per_round or len(rows)) * mean)
