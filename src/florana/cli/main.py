"""The command line: parses, calls one function each, and turns errors into a few lines and an exit code."""

from __future__ import annotations

import errno
import functools
import io
import json
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from florana.atomic_files import refused
from florana.cli.adapter_verbs import inspect, merge
from florana.cli.audit_verb import audit
from florana.cli.compare_verb import compare
from florana.cli.deploy_verbs import doctor, join, serve
from florana.cli.extras import missing
from florana.cli.flower_verbs import flower
from florana.cli.interrupted import Interrupted, interruptible
from florana.cli.plan_verb import plan
from florana.cli.recipe_verb import init, recipe
from florana.cli.run_verb import run
from florana.cli.say import say
from florana.cli.use_verbs import evaluate, predict
from florana.cli.verb import Verb, Verbs
from florana.cli.watch_verb import watch
from florana.displayable import displayable
from florana.errors import FederationError, FloranaError, InputError, RecipeError

app = typer.Typer(
    cls=Verbs,
    help="Federated LoRA fine-tuning whose server step is as exact as the rank allows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        import importlib.metadata

        say(f"florana {importlib.metadata.version('florana')}")
        raise typer.Exit


def demo(
    out: Annotated[Path, typer.Option(help="A new folder for the runs and the report.")] = Path("florana-demo"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per strategy.")] = 7,
    replace: Annotated[bool, typer.Option("--replace", help="Remove an earlier demo in that folder first.")] = False,
    as_json: Json = False,
) -> None:
    """Train four strategies on real text, offline, in about two minutes, and write a report.

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
    with (
        interruptible(lambda: f"begin anew with: florana demo --out {out} --replace") as interrupted_before,
        Screen(console, "demo", steps=len(STRATEGIES) * rounds * CLIENTS * STEPS) as screen,
    ):

        def stepped(client: str) -> None:
            interrupted_before()
            screen.step(client)

        results, report = run_demo(out, rounds, lambda name: screen.named(name).show, stepped)
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


_VERBS = (
    demo, init, run, recipe, report, watch, predict, evaluate, compare, merge, inspect, plan, audit,
    serve, join, doctor,
)  # fmt: skip
for _verb in _VERBS:
    app.command(cls=Verb)(_verb)
app.add_typer(flower, name="flower")


DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""Of errors of the system, those that are a disk's, whatever was written when it refused."""


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
    except Interrupted as stop:
        say(displayable(str(stop)), err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except ModuleNotFoundError as error:
        told = missing(error)
        if told is None:
            _bug(error)
        _complain(str(told))
        sys.exit(InputError.exit_code)
    except OSError as error:
        if error.errno not in DISKS:
            _bug(error)
        _complain(str(refused(error, "a file could not be written", again="try again")))
        sys.exit(FederationError.exit_code)
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
