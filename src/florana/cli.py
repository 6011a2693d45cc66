"""The command line: parses, calls one function each, and turns errors into a few lines and an exit code."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florana.cli_compare import compare
from florana.errors import FloranaError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from florana.recipe import Recipe
    from florana.run import Setup

app = typer.Typer(
    help="Federated LoRA fine-tuning whose server step adds up.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.command()(compare)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        import importlib.metadata

        typer.echo(f"florana {importlib.metadata.version('florana')}")
        raise typer.Exit


@app.command()
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
    from florana.demo.demo import CLIENTS, STEPS, STRATEGIES, run_demo
    from florana.report.views import summary, views
    from florana.screen import Screen, summary_table

    console = _console(as_json)
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


@app.command()
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
    from florana.recipe_file import read_recipe

    resolved = read_recipe(recipe, assign or [])
    folder = out or Path("runs") / recipe.stem
    console = _console(as_json)
    if dry_run:
        _print_plan(resolved, console)
        return
    from florana.run_folder import check_folder

    check_folder(resolved, folder, resume)
    from florana.report.page import write_report
    from florana.report.views import summary, views
    from florana.run import execute, prepare
    from florana.screen import Screen, summary_table

    if console:
        console.print(f"loading {resolved.model.base} and {resolved.data.train}", highlight=False, soft_wrap=True)
    setup = prepare(resolved)
    with Screen(console, resolved.strategy["name"], steps=_steps(resolved, setup)) as screen:
        execute(resolved, folder, setup=setup, resume=resume, show=screen.show, step=screen.step)
    report = write_report([folder], folder / "report.html")
    rows = summary(views([folder]))
    if as_json:
        typer.echo(json.dumps({**rows[0], "run": str(folder), "report": str(report)}, indent=1))
    elif console:
        console.print(summary_table(rows, resolved.title or recipe.stem, console.width))
        console.print(
            f"run: {folder}\nadapter: {folder / 'adapter'}\nreport: {report}", highlight=False, soft_wrap=True
        )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="The page's heading.")] = "",
    as_json: Json = False,
) -> None:
    """Draw one or more runs in one self-contained HTML file.

    Example: florana report runs/sst2 --out sst2.html
    """
    from florana.report.page import write_report
    from florana.report.views import summary, views
    from florana.screen import summary_table

    path = write_report(runs, out, title)
    rows = summary(views(runs))
    console = _console(as_json)
    if as_json:
        typer.echo(json.dumps({"runs": rows, "report": str(path)}, indent=1))
    elif console:
        console.print(summary_table(rows, title or "runs", console.width))
        console.print(f"report: {path}", highlight=False, soft_wrap=True)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT LoRA folders on one base model.")],
    out: Annotated[Path, typer.Option(help="A new folder for the merged adapter.")],
    method: Annotated[str, typer.Option(help="best-rank, stack (exact), flora-na or fedit.")] = "best-rank",
    rank: Annotated[int | None, typer.Option(help="Of the result, for best-rank. Default: the largest.")] = None,
    weights: Annotated[str | None, typer.Option(help="One per adapter, like 3,1,1. Default: equal.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the widest.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model's name in the result.")] = None,
    as_json: Json = False,
) -> None:
    """Merge LoRA adapters exactly, or as exactly as a rank allows, and say how exactly that is.

    Example: florana merge north south west --weights 1200,800,400 --rank 16 --out merged
    """
    from florana.merge import merge as merge_folders
    from florana.screen import counting, merge_line, merge_table

    console = _console(as_json)
    with counting(console, "merging", "modules") as done:
        result = merge_folders(
            adapters,
            out,
            method=method,
            rank=rank,
            weights=_numbers(weights),
            dtype=dtype,
            base=base,
            done=done,
        )
    if as_json:
        typer.echo(json.dumps({**result.to_json(), "out": str(out)}, indent=1))
    elif console:
        console.print(merge_table(result))
        console.print(merge_line(result), highlight=False, soft_wrap=True)
        terms = sum(max(source.ranks) for source in result.sources)
        if result.rank > terms:
            console.print(f"note: the sum has rank {terms} at most, the rest is zeros: --rank {terms} is as exact")
        if len({adapter.resolve() for adapter in adapters}) < len(adapters):
            console.print("note: an adapter is given more than once and counts as often")
        console.print(
            f"adapter: {out} (PEFT loads it as it is; README.md says how it was made)", highlight=False, soft_wrap=True
        )


@app.command()
def inspect(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT LoRA folders.")],
    weights: Annotated[str | None, typer.Option(help="One per adapter, like 3,1,1. Default: equal.")] = None,
    as_json: Json = False,
) -> None:
    """Show what adapters are, how far apart they are, and what each way of merging them would lose.

    Example: florana inspect north south west
    """
    from florana.inspection import inspect as inspect_folders
    from florana.screen import inspection_tables

    result = inspect_folders(adapters, _numbers(weights))
    console = _console(as_json)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1))
    elif console:
        for table in inspection_tables(result):
            console.print(table)
        bases = sorted({sheet.base_model for sheet in result.sheets})
        if len(bases) > 1:
            console.print(f"note: they name different base models ({', '.join(bases)}); merge will ask for --base")


def main() -> None:
    """The entry point: what a user can cause ends in a few lines and the promised code, never in a traceback."""
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
    except Exception as error:
        log = Path("florana-error.log")
        try:
            log.write_text(traceback.format_exc(), encoding="utf-8")
            where = f"the traceback is in {log.resolve()}"
        except OSError:
            where = traceback.format_exc()
        _complain(f"florana failed unexpectedly ({type(error).__name__}: {error}); this is a bug, {where}")
        sys.exit(1)


def _console(as_json: bool) -> Console | None:
    from rich.console import Console

    return None if as_json else Console(width=None if sys.stdout.isatty() else 140)


def _complain(text: str) -> None:
    for index, line in enumerate(text.splitlines()):
        typer.secho(("error: " if index == 0 else "  ") + line, fg="red" if index == 0 else None, err=True)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights {text!r} is not a list of numbers", fix="for example --weights 3,1,1") from None


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
    from florana.plan import plan
    from florana.run import prepare
    from florana.screen import plan_table

    result = plan(recipe, prepare(recipe))
    if console:
        console.print(plan_table(result))
    else:
        typer.echo(json.dumps(result.to_json(), indent=1))


def _steps(recipe: Recipe, setup: Setup) -> int:
    from florana.train.client import steps_per_round

    rows = [len(data.train) for data in setup.clients.values()]
    mean = sum(steps_per_round(recipe.train, count) for count in rows) / len(rows)
    return round(recipe.federation.rounds * (recipe.federation.clients_per_round or len(rows)) * mean)
