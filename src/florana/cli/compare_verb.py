"""The verb `compare`: parses, calls the study, writes its tables and its page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from florana.cli.interrupted import interruptible, safe
from florana.cli.track_option import Track, note, trackers
from florana.errors import RecipeError


def compare(
    recipe: Annotated[Path, typer.Argument(help="A recipe; its study section may name methods, alphas and ranks.")],
    methods: Annotated[
        str | None,
        typer.Option(help=r"Like fedit,flora-na,best-rank\[carry_rank=8],my_file.py:my_rule. Default: the recipe's."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; the recipe's seed is the first.")] = None,
    alphas: Annotated[str | None, typer.Option(help="Dirichlet parameters, like 0.1,1.")] = None,
    ranks: Annotated[str | None, typer.Option(help="LoRA ranks, like 4,16; alpha / rank is kept.")] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(help="key=value,value,...: choose it for each method on the validation rows, before any score."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The study's folder; one that exists is continued.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Groups of runs at once. Default: cores and memory.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the recipe's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs with bytes and time, and end.")] = False,
    track: Track = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Compare methods over seeds on the same partitions, with controls, intervals, and the fixed-updates ablation.

    Example: florana compare recipes/study-small.toml --seeds 3
    """
    from florana.recipe.load import read_recipe
    from florana.study.grid import plan_of
    from florana.study.named_methods import split_methods
    from florana.study.tune import jobs_of, require_tunable, rounds_of, tuned_values

    plan = plan_of(
        read_recipe(recipe, set_ or []),
        methods=split_methods(methods or ""),
        seeds=seeds,
        alphas=_numbers(alphas, "--alphas"),
        ranks=[int(number) for number in _numbers(ranks, "--ranks")],
        tune=tuned_values(tune or []),
    )
    require_tunable(plan)
    folder = out or Path("studies") / recipe.stem
    from florana.cli.console import console_of
    from florana.cli.display_study import forecast_table, others_table, study_progress, study_table
    from florana.study.publish import publish
    from florana.study.runner import alone_in, execute_study, folder_of, rounds_left, threads_of, tune_study
    from florana.track.tracking import tracked_study

    console = console_of(as_json, width=200)
    if dry_run:
        from florana.study.forecast import forecast

        lines = forecast(plan, folder)
        if console:
            console.print(forecast_table(lines))
        else:
            typer.echo(json.dumps([asdict(line) for line in lines], indent=1))
        return
    names = trackers(track)
    tuning = sum(rounds_of(job) for job in jobs_of(plan, folder, 1))
    left = rounds_left(plan, folder)
    if console:
        console.print(
            f"{len(plan.cells)} runs ({len(plan.methods)} methods, {len(plan.settings)} settings x seeds), "
            f"{left} rounds to do"
            + (f" after {tuning} of tuning" if tuning else "")
            + f", threads {threads_of(plan, folder, jobs)} each",
            highlight=False,
        )
    runs = {cell.id: folder_of(folder, cell) for cell in plan.cells}
    with (
        alone_in(folder),
        interruptible(lambda: f"{safe(list(runs.values()))}; go on with: the same command") as interrupted_before,
        study_progress(console, left + tuning) as told_of,
    ):

        def advance(count: int, name: str) -> None:
            interrupted_before()
            told_of(count, name)

        plan, tried, failed = tune_study(plan, folder, jobs, advance)
        with tracked_study(folder, runs, plan.base.federation.rounds, names, note) as look:

            def told(count: int, name: str) -> None:
                advance(count, name)
                look()

            failures = execute_study(plan, folder, jobs, told, failed)
    comparison, swapped, page = publish(plan, folder, failures, tried)
    if as_json:
        found = {**comparison.to_json(), "swap": swapped, "failures": failures, "report": str(page)}
        typer.echo(json.dumps(found, indent=1))
    elif console:
        console.print(study_table(comparison, console.width))
        if (others := others_table(comparison)) is not None:
            console.print(others)
        for line in swapped["text"]:
            console.print(line, highlight=False)
        for cell, reason in sorted(failures.items()):
            console.print(f"failed: {cell}: {reason}", style="red", highlight=False)
        console.print(f"tables: {folder}/table.md, .csv, .tex\nreport: {page}", highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(4)


def _numbers(text: str | None, option: str) -> list[float]:
    try:
        return [float(word) for word in (text or "").split(",") if word.strip()]
    except ValueError:
        raise RecipeError(f"{option} {text!r} is not a list of numbers", fix=f"for example {option} 0.1,1") from None
