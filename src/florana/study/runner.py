"""Doing a study: groups of cells side by side, each cell an ordinary run folder; what is finished is never done again.

OUT/runs/<setting>/seed-<n>/<method>/   a run folder          OUT/swap/<setting>-seed-<n>.json   the ablation
OUT/failures.json                       cell -> why it failed; the table marks the gap
OUT/progress.json                       the cells, and how far they were at the start: for who watches
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from florana.atomic_files import explained, replace_file
from florana.bounded import json_of
from florana.errors import FloranaError
from florana.federation.best import enough
from florana.federation.event import Event
from florana.federation.journal import read_records
from florana.federation.round_record import RoundRecord
from florana.recipe import schema as r
from florana.runs.run_folder import STUDY, locked, recorded_threads
from florana.runs.threads import threads
from florana.study.grid import CENTRALISED, Cell, Plan, Setting, recipe_of
from florana.study.jobs import default_jobs, in_jobs
from florana.study.named_methods import Method
from florana.study.tune import Tuning, jobs_of, tune


@dataclass(frozen=True)
class Group:
    """What one worker does: the cells of a setting, in order, in the folder `out`."""

    base: r.Recipe
    setting: Setting
    cells: Sequence[Cell]
    out: Path
    threads: int
    fixed_updates_rounds: Sequence[int]
    rounds_on: int = 0


def execute_study(
    plan: Plan,
    out: Path,
    jobs: int | None,
    advance: Callable[[int, str], None],
    failed: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run every cell that is not finished; `advance` is told of committed rounds (how many, of what).

    Args:
        plan: the study.
        out: its folder; finished runs in it are kept.
        jobs: groups of runs at once; None: by cores and memory.
        advance: told of committed rounds (how many, of what).
        failed: cell id -> why it cannot be run, of those that tuning gave up.

    Returns:
        cell id -> why it failed, for those that did. The rest of the study goes on.
    """
    failures = dict(failed or {})
    with alone_in(out):
        _note(plan, out, failures)
        groups = [
            Group(plan.base, setting,
                  [cell for cell in plan.cells if cell.setting == setting and cell.id not in failures], out,
                  threads_of(plan, out, jobs), plan.fixed_updates_rounds, plan.rounds_on)
            for setting in plan.settings
        ]  # fmt: skip
        for found in in_jobs(work, groups, jobs, advance):
            failures |= found
        replace_file(out / "failures.json", (json.dumps(failures, indent=1) + "\n").encode())
    return failures


def tune_study(
    plan: Plan, out: Path, jobs: int | None, advance: Callable[[int, str], None]
) -> tuple[Plan, list[Tuning], dict[str, str]]:
    """Choose each method's settings as `florana.study.tune` does.

    Args:
        plan: the study; one without `tune` comes back as it is.
        out: the study's folder.
        jobs: methods at once; None: by cores and memory.
        advance: told of committed rounds (how many, of what).

    Returns:
        The study with what was chosen, what was tried, and cell id -> why it cannot be run.
    """
    with alone_in(out):
        _note(plan, out, {})
        found = in_jobs(tune, jobs_of(plan, out, threads_of(plan, out, jobs)), jobs, advance)
    chosen = {(one.setting, one.method): one.chosen for one in found if one.chosen is not None}
    lost = {(one.setting, one.method): one for one in found if one.chosen is None}
    failures = {
        cell.id: "every candidate of its tuning failed: " + lost[key].candidates[0].why
        for cell in plan.cells
        if (key := (cell.setting.name, cell.method.label)) in lost
    }
    return replace(plan, tuned=chosen), found, failures


def _note(plan: Plan, out: Path, failures: Mapping[str, str]) -> None:
    """Write down what is begun, or gone on with: for who watches, and for nobody else."""
    begun = {
        "cells": [cell.id for cell in plan.cells],
        "rounds": plan.base.federation.rounds,
        "left": rounds_left(plan, out),
        "time": time.time(),
    }
    replace_file(out / STUDY, (json.dumps(begun, indent=1) + "\n").encode())
    replace_file(out / "failures.json", (json.dumps(failures, indent=1) + "\n").encode())


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """The study's folder, made where it is not there, for one florana at a time; who has it may have it again.

    Args:
        out: the study's folder.

    Raises:
        FederationError: another florana is at work in it, or it cannot be written.
    """
    with explained(out, "the study's folder could not be made"):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        yield


def threads_of(plan: Plan, out: Path, jobs: int | None) -> int:
    """With how many threads each run of the study works, in all of it the same: as the recipe says, or as the study
    was begun, or a share of the cores, never more than OMP_NUM_THREADS says; one where clients train side by side."""
    if plan.base.engine.workers > 1:
        return 1
    begun = (recorded_threads(folder_of(out, cell)) for cell in plan.cells)
    recorded = plan.base.threads or next(filter(None, begun), None)
    share = (os.cpu_count() or 1) // min(jobs or default_jobs(), len(plan.settings))
    return recorded or min(max(1, share), torch.get_num_threads())


def rounds_left(plan: Plan, out: Path) -> int:
    """Rounds of the study that are not committed yet."""
    return sum(rounds_left_of(plan, out, cell) for cell in plan.cells)


def rounds_left_of(plan: Plan, out: Path, cell: Cell) -> int:
    """Rounds of one run that are not committed yet."""
    recipe, records = recipe_of(plan.base, cell), read_records(folder_of(out, cell) / "rounds.jsonl")
    return 0 if complete(recipe, records) else recipe.federation.rounds - len(records)


def complete(recipe: r.Recipe, records: Sequence[RoundRecord]) -> bool:
    """Whether these are all rounds that the recipe's run will have: the last one, or those that its patience allows."""
    asked = recipe.evaluate
    return len(records) >= recipe.federation.rounds or enough(records, asked.by, asked.patience)


def folder_of(out: Path, cell: Cell) -> Path:
    """The run folder of a cell."""
    return out / "runs" / cell.id


def swap_file(out: Path, setting: Setting) -> Path:
    """Where the fixed-updates ablation of a setting stands."""
    return out / "swap" / f"{setting.name}-seed-{setting.seed}.json"


def work(group: Group, tell: Callable[[str], Any]) -> dict[str, str]:
    """One group: prepare once, run what is unfinished, then the fixed-updates ablation. Returns cell id -> why it
    failed."""
    with threads(group.threads):
        return _work(group, tell)


def _work(group: Group, tell: Callable[[str], Any]) -> dict[str, str]:
    from florana.runs.prepared import prepare
    from florana.runs.setup import execute
    from florana.study.fixed_updates import swap

    failures: dict[str, str] = {}
    fedit = next((cell for cell in group.cells if cell.method.label == "fedit"), None)
    most = recipe_of(group.base, fedit or group.cells[0]) if group.cells else None
    setup = None  # that of nearly all cells; the others, controls above all, have a model or rows of their own
    todo = [cell for cell in group.cells if not finished(group, cell)]
    for cell in todo:
        recipe = recipe_of(group.base, cell)

        def show(event: Event, label: str = cell.method.label) -> None:
            if event.kind == "committed":
                tell(label)

        try:
            shared = most is not None and prepared_by(recipe) == prepared_by(most)
            if shared and setup is None:
                setup = prepare(recipe)
            folder = folder_of(group.out, cell)
            execute(recipe, folder, setup=setup if shared else None, resume=folder.exists(), show=show)
        except FloranaError as error:
            failures[cell.id] = str(error).replace("\n", "; ")
    target, asked = swap_file(group.out, group.setting), swap_asked(group)
    # its updates are those of FedIT's clients: without FedIT, whose tuning may have failed, there are none to merge
    if group.fixed_updates_rounds and fedit is not None and not swapped(target, asked):
        started = time.perf_counter()
        recipe = recipe_of(group.base, fedit)
        methods = [cell.method for cell in group.cells if rule_alone(cell.method)]
        try:
            rows = swap(recipe, setup or prepare(recipe), methods, group.fixed_updates_rounds, group.rounds_on)
        except FloranaError as error:
            failures[f"fixed-updates ablation, {group.setting.name}, seed {group.setting.seed}"] = str(error).replace(
                "\n", "; "
            )
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            seconds = time.perf_counter() - started
            content = {"seconds": seconds, "threads": group.threads, "asked": asked, "rows": rows}
            replace_file(target, (json.dumps(content, indent=1) + "\n").encode())
    return failures


def prepared_by(recipe: r.Recipe) -> str:
    """What `runs.setup.prepare` makes of a recipe follows from this part of it: cells that agree in it share a model
    and rows."""
    parts = {"seed", "task", "model", "data", "partition", "generation"}
    return json.dumps(recipe.model_dump(include=parts), sort_keys=True)


def rule_alone(method: Method) -> bool:
    """Whether the method is a rule for given updates and nothing more: what the fixed-updates ablation can judge."""
    return not method.settings and method.strategy["name"] not in (CENTRALISED, "local-only")


def finished(group: Group, cell: Cell) -> bool:
    """Whether the cell's folder holds all its rounds, made by this very recipe."""
    folder = folder_of(group.out, cell)
    recipe, recorded = recipe_of(group.base, cell), recorded_threads(folder)
    if not complete(recipe, read_records(folder / "rounds.jsonl")):
        return False
    wanted = recipe.model_copy(update={"threads": recipe.threads or recorded})
    return recorded is not None and (folder / "recipe.toml").read_text() == wanted.to_toml()


def swap_asked(group: Group) -> str:
    """The digest of what a fixed-updates ablation is made of, each cell's recipe and the rounds: another question,
    another test."""
    recipes = [recipe_of(group.base, cell).to_toml() for cell in group.cells]
    made_of = [recipes, list(group.fixed_updates_rounds), *([group.rounds_on] if group.rounds_on else [])]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def swapped(path: Path, asked: str) -> bool:
    """Whether the file holds the very ablation that is asked for; one that is damaged is made anew."""
    try:
        found = json_of(path.read_bytes()) if path.exists() else None
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("asked") == asked and isinstance(found.get("rows"), list)
