"""The command line: parses, calls one function each, and turns errors into a few lines and an exit code."""

from __future__ import annotations

import functools
import io
import json
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from florana.cli.adapter_verbs import inspect, merge
from florana.cli.compare_verb import compare
from florana.cli.deploy_verbs import doctor, flower, join, serve
from florana.cli.extras import missing
from florana.cli.plan_verb import plan
from florana.cli.say import say
from florana.cli.verb import Verb
from florana.displayable import displayable
from florana.errors import FloranaError, InputError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from florana.recipe.schema import Recipe
    from florana.runs.setup import Setup

app = typer.Typer(
    help="Federated LoRA fine-tuning whose server step is as exact as the rank allows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

for _verb in (merge, inspect, compare, plan, serve, join, doctor):
    app.command(cls=Verb)(_verb)
app.add_typer(flower, name="flower")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        import importlib.metadata

        say(f"florana {importlib.metadata.version('florana')}")
        raise typer.Exit


@app.command(cls=Verb)
def demo(
    out: Annotated[Path, typer.Option(help="A new folder for the runs and the report.")] = Path("florana-demo"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per strategy.")] = 7,
    replace: Annotated[bool, typer.Option("--replace", help="Remove an earlier demo in that folder first.")] = False,
    as_json: Json = False,
) -> None:
    """Train four strategies on real text, offline, in about a minute, and write a report.

    Example: florana demo --out florana-demo
    """
    _prepare_demo_folder(out, replace)
    from florana.cli.console import console_of
    from florana.cli.display import Screen, summary_table
    from florana.demo.demo import CLIENTS, STEPS, STRATEGIES, run_demo
    from florana.report.views import summary, views

    console = console_of(as_json)
    if console:
        console.print(
            f"florana demo: the docstrings of Python's standard library, ten topics, {CLIENTS} clients; "
            f"{len(STRATEGIES)} strategies, {rounds} rounds each",
            highlight=False,
        )
    with Screen(console, "demo", steps=len(STRATEGIES) * rounds * CLIENTS * STEPS) as screen:
        results, report = run_demo(out, rounds, lambda name: screen.named(name).show, screen.step)
    rows = summary(views([result.folder for result in results]))
    if as_json:
        typer.echo(json.dumps({"runs": rows, "report": str(report)}, indent=1))
    elif console:
        console.print(summary_table(rows, "Same clients, same start; only the server's step differs", console.width))
        console.print(
            f"report: {report}\nadapters: {out}/<strategy>/adapter (PEFT loads them as they are)",
            highlight=False,
            soft_wrap=True,
        )


@app.command(cls=Verb)
def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; recipes/ has examples.")],
    out: Annotated[Path | None, typer.Option(help="A new folder for the run. Default: runs/<recipe's name>.")] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and end.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe, round by round, into a run folder.

    Example: florana run recipes/sst2-minilm.toml --out runs/sst2 --set federation.rounds=4
    """
    from florana.recipe.load import read_recipe

    resolved = read_recipe(recipe, assign or [])
    folder = out or Path("runs") / recipe.stem
    from florana.cli.console import console_of

    console = console_of(as_json)
    if dry_run:
        _print_plan(resolved, console)
        return
    from florana.runs.run_folder import check_folder

    check_folder(resolved, folder, resume)
    from florana.cli.display import Screen, figures_table, summary_table
    from florana.report.page import write_report
    from florana.report.views import rows_note, shown_figures, summary, views
    from florana.runs.rounds import settled
    from florana.runs.setup import execute, prepare

    with settled(resolved, folder) as own:
        if console:
            what = f"loading {own.model.base} and {own.data.train}, threads {own.threads}"
            console.print(what, highlight=False, soft_wrap=True)
        setup = prepare(own)
    if console and rows_note(setup.partition):
        console.print(rows_note(setup.partition), highlight=False)
    shown = shown_figures(resolved.model_dump())
    with Screen(console, resolved.strategy["name"], steps=_steps(resolved, setup), figures=shown) as screen:
        execute(resolved, folder, setup=setup, resume=resume, show=screen.show, step=screen.step)
    report = write_report([folder], folder / "report.html")
    rows = summary(views([folder]))
    if as_json:
        typer.echo(json.dumps({**rows[0], "run": str(folder), "report": str(report)}, indent=1))
    elif console:
        console.print(summary_table(rows, resolved.title or recipe.stem, console.width))
        if (more := figures_table(views([folder]))) is not None:
            console.print(more)
        console.print(
            f"run: {folder}\nadapter: {folder / 'adapter'}\nreport: {report}", highlight=False, soft_wrap=True
        )


@app.command(cls=Verb)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="The page's heading.")] = "",
    as_json: Json = False,
) -> None:
    """Draw one or more runs in one self-contained HTML file.

    Example: florana report runs/sst2 --out sst2.html
    """
    from florana.cli.console import console_of
    from florana.cli.display import figures_table, summary_table
    from florana.report.page import write_report
    from florana.report.views import summary, views

    path = write_report(runs, out, title)
    rows = summary(views(runs))
    console = console_of(as_json)
    if as_json:
        typer.echo(json.dumps({"runs": rows, "report": str(path)}, indent=1))
    elif console:
        console.print(summary_table(rows, title or "runs", console.width))
        if (more := figures_table(views(runs))) is not None:
            console.print(more)
        console.print(f"report: {path}", highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point: what a user can cause ends in a few lines and the promised code, never in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is written as an escape
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = functools.partial(_noted, warnings.showwarning)
    try:
        app()
    except FloranaError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain("interrupted; the committed rounds stand, continue with --resume")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except ModuleNotFoundError as error:
        told = missing(error)
        if told is None:
            _bug(error)
        _complain(str(told))
        sys.exit(InputError.exit_code)
    except Exception as error:
        _bug(error)


def _bug(error: Exception) -> NoReturn:
    """End with code 1, and with the traceback in a file."""
    log = Path("florana-error.log")
    try:
        log.write_text(traceback.format_exc(), encoding="utf-8")
        where = f"the traceback is in {log.resolve()}"
    except OSError:
        where = traceback.format_exc()
    _complain(f"florana failed unexpectedly ({_told(error)}); this is a bug, {where}")
    sys.exit(1)


def _noted(show: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Old names in a recipe as a line for a person, where Python would print a place in the code."""
    if category is FutureWarning and "is now called" in str(message):
        say(f"note: {message}", color="yellow", err=True)
    else:
        show(message, category, *place)


def _told(error: Exception) -> str:
    return "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])


def _complain(text: str) -> None:
    for index, line in enumerate(text.split("\n")):
        say(("error: " if index == 0 else "  ") + displayable(line), color="red" if index == 0 else None, err=True)


def _prepare_demo_folder(out: Path, replace: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = (out.is_dir() and (out / "report.html").exists()) or any(out.glob("*/rounds.jsonl"))
    if not (replace and ours):
        raise RecipeError(
            f"--out {out} exists already",
            why="florana never writes over a run",
            fix="name a new folder" + (", or add --replace" if ours else ""),
        )
    shutil.rmtree(out)


def _print_plan(recipe: Recipe, console: Console | None) -> None:
    from florana.cli.display import plan_table
    from florana.runs.dry_run import plan as plan_run
    from florana.runs.setup import prepare
    from florana.runs.threads import threads

    with threads(recipe.threads):
        result = plan_run(recipe, prepare(recipe))
    if console:
        console.print(plan_table(result))
    else:
        typer.echo(json.dumps(result.to_json(), indent=1))


def _steps(recipe: Recipe, setup: Setup) -> int:
    from florana.train.client import steps_per_round

    rows = [len(data.train) for data in setup.clients.values()]
    mean = sum(steps_per_round(recipe.train, count) for count in rows) / len(rows)
    return round(recipe.federation.rounds * (recipe.federation.clients_per_round or len(rows)) * mean)
