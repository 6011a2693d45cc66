"""Each method's own settings, chosen on the validation rows before any score: a grid, and successive halving.

    n candidates have k = max(1, ceil(log2 n)) levels; level i = 0 ... k - 1 trains those that are left to round
    R / 2^(k - 1 - i) and keeps the better half; the best one of the last level, at round R, is chosen.

Jamieson and Talwalkar, arXiv 1502.07943. The seeds are none of those that are scored, and the test set is not read:
what a candidate's run measures as its common test set is the validation rows.

OUT/tune/<setting>/<method>/<digest>-seed-<n>/   run folders
OUT/tune/<setting>/<method>.json                 the grid, its figures, the choice
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from florana.atomic_files import explained, replace_file
from florana.errors import FloranaError, RecipeError
from florana.federation.best import LOWER_IS_BETTER
from florana.federation.journal import read_records
from florana.recipe import schema as r
from florana.recipe.load import parsed
from florana.runs.threads import threads
from florana.study.grid import CENTRALISED, Cell, Plan, Setting, recipe_of
from florana.study.named_methods import Method

APART = 1000
"""The first seed of tuning is so far behind the study's first."""


@dataclass(frozen=True)
class Candidate:
    """One point of the grid.

    Args:
        settings: dotted key -> value.
        figure: what its last level measured on the validation rows, the mean over the tuning seeds; None where it
            failed or was not finite.
        rounds: how far it was trained.
        why: why it failed, where it did.
    """

    settings: Mapping[str, Any]
    figure: float | None = None
    rounds: int = 0
    why: str = ""


@dataclass(frozen=True)
class Tuning:
    """What tuning found for one method in one setting.

    Args:
        setting: its name.
        method: its label.
        by: the figure.
        candidates: every point of the grid.
        chosen: the winner's settings; None where every candidate failed.
        rounds: rounds trained in all, over all candidates and seeds.
    """

    setting: str
    method: str
    by: str
    candidates: Sequence[Candidate]
    chosen: Mapping[str, Any] | None
    rounds: int


@dataclass(frozen=True)
class Job:
    """The tuning of one method in one setting, in the folder `out`."""

    plan: Plan
    setting: Setting
    method: Method
    out: Path
    threads: int


def tuned_values(options: Sequence[str]) -> dict[str, list[Any]]:
    """Dotted key -> the values to try, of `key=value,value,...`. Raises RecipeError where it is not that.

    Examples:
        >>> tuned_values(["train.learning_rate=1e-3,2e-3"])
        {'train.learning_rate': [0.001, 0.002]}
    """
    found: dict[str, list[Any]] = {}
    for option in options:
        key, equals, values = (part.strip() for part in option.partition("="))
        if not equals or not values or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", key):
            raise RecipeError(f"--tune {option!r} is not key=value,value,...",
                              fix="for example --tune train.learning_rate=1e-3,2e-3,5e-3")  # fmt: skip
        found[key] = [parsed(value.strip()) for value in values.split(",")]
    return found


def levels(count: int, rounds: int) -> list[tuple[int, int]]:
    """(how many candidates are left, to which round they are trained), level by level.

    Args:
        count: of the candidates, at least 1.
        rounds: of a whole run.

    Examples:
        >>> levels(4, 20), levels(5, 20), levels(1, 20)
        ([(4, 10), (2, 20)], [(5, 5), (3, 10), (2, 20)], [(1, 20)])
    """
    number = max(1, math.ceil(math.log2(count)))
    found, left = [], count
    for level in range(number):
        found.append((left, max(1, math.ceil(rounds / 2 ** (number - 1 - level)))))
        left = math.ceil(left / 2)
    return found


def grid_of(plan: Plan, method: Method) -> list[dict[str, Any]]:
    """The candidates of a method: the product of the values that go with it; a key with fewer than two of them stays as
    the recipe has it.

    Args:
        plan: the study; what it tunes.
        method: one of its methods.

    Raises:
        RecipeError: a candidate that is no recipe, though each of its values alone is one.
    """
    kept: dict[str, list[Any]] = {}
    for key, values in plan.tune.items():
        fitting = [value for value in values if _refusal(plan, method, {key: value}) is None]
        if len(fitting) > 1:
            kept[key] = fitting
    points = [dict(zip(kept, values, strict=True)) for values in itertools.product(*kept.values())]
    for point in points:
        if (refusal := _refusal(plan, method, point)) is not None:
            raise refusal
    return points


def require_tunable(plan: Plan) -> None:
    """Raise RecipeError where a key to tune means something to none of the methods: it is misspelt, most likely."""
    for key, values in plan.tune.items():
        refusals = [_refusal(plan, method, {key: value}) for method in plan.methods for value in values]
        if refusals and all(refusals):
            raise refusals[0]  # type: ignore[misc]


def _refusal(plan: Plan, method: Method, point: Mapping[str, Any]) -> RecipeError | None:
    try:
        recipe_of(plan.base, Cell(plan.settings[0], method, point))
    except RecipeError as error:
        return error
    return None


def tunable(plan: Plan, method: Method) -> bool:
    """Whether a method has a global model that the validation rows can judge, and a grid of two points at least."""
    if method.strategy["name"] != CENTRALISED:
        recipe = recipe_of(plan.base, Cell(plan.settings[0], method))
        if recipe.model.personal or not recipe.build_strategy().facts.one_model:
            return False
    return len(grid_of(plan, method)) > 1


def jobs_of(plan: Plan, out: Path, count: int) -> list[Job]:
    """One job, with so many threads, for each method and setting that can be tuned; none where nothing is tuned."""
    if not plan.tune:
        return []
    firsts = {setting.name: setting for setting in reversed(plan.settings)}
    methods = [method for method in plan.methods if tunable(plan, method)]
    return [Job(plan, setting, method, out, count) for setting in firsts.values() for method in methods]


def rounds_of(job: Job) -> int:
    """How many rounds the job trains in all, over its candidates and seeds."""
    total, before = 0, 0
    for left, until in levels(len(grid_of(job.plan, job.method)), job.plan.base.federation.rounds):
        total += left * (until - before)
        before = until
    return total * job.plan.tune_seeds


def tune(job: Job, tell: Callable[[str], Any]) -> Tuning:
    """Do one job; what its folder holds of it already is not done again. `tell` hears of each committed round."""
    with threads(job.threads):
        found = _tune(job, tell)
    place = _place(job)
    with explained(place.parent, "the study's folder could not be made"):
        place.parent.mkdir(parents=True, exist_ok=True)  # no candidate may have come so far as to make it
    replace_file(place.with_name(place.name + ".json"), (json.dumps(asdict(found), indent=1) + "\n").encode())
    return found


def _tune(job: Job, tell: Callable[[str], Any]) -> Tuning:
    by, rounds = job.plan.base.evaluate.by, job.plan.base.federation.rounds
    candidates = [Candidate(point) for point in grid_of(job.plan, job.method)]
    steps = levels(len(candidates), rounds)
    every = math.gcd(*(until for _, until in steps))
    setups: dict[int, Any] = {}
    left = list(range(len(candidates)))
    for count, until in steps:
        left = left[:count]
        for index in left:
            candidates[index] = _trained(job, candidates[index], until, every, setups, tell)
        left.sort(key=lambda index: _rank(candidates[index], by))
    best = candidates[left[0]]
    return Tuning(
        setting=job.setting.name,
        method=job.method.label,
        by=by,
        candidates=candidates,
        chosen=best.settings if best.figure is not None else None,
        rounds=sum(candidate.rounds for candidate in candidates) * job.plan.tune_seeds,
    )


def _rank(candidate: Candidate, by: str) -> float:
    if candidate.figure is None:
        return math.inf
    return candidate.figure if by in LOWER_IS_BETTER else -candidate.figure


def _trained(
    job: Job, candidate: Candidate, until: int, every: int, setups: dict[int, Any], tell: Callable[[str], Any]
) -> Candidate:
    """The candidate after round `until` on every tuning seed, with what the validation rows say of it."""
    from florana.runs.prepared import prepare
    from florana.runs.setup import execute

    if candidate.why:
        return candidate
    values = []
    for number in range(job.plan.tune_seeds):
        setting = replace(job.setting, seed=job.plan.settings[0].seed + APART + number)
        recipe = _blind(recipe_of(job.plan.base, Cell(setting, job.method, candidate.settings)), every)
        digest = hashlib.sha256(recipe.to_toml().encode()).hexdigest()[:12]
        folder = _place(job) / f"{digest}-seed-{setting.seed}"
        try:
            if len(read_records(folder / "rounds.jsonl")) < until:
                if number not in setups:
                    whole = prepare(recipe)
                    setups[number] = replace(whole, common=whole.validation, validation=(), more={})
                execute(
                    recipe,
                    folder,
                    setup=setups[number],
                    resume=folder.exists(),
                    show=lambda event: tell(f"tuning {job.method.label}") if event.kind == "committed" else None,
                    until=until,
                )
            values.append(_figure(folder, until, recipe.evaluate.by))
        except FloranaError as error:
            return replace(candidate, figure=None, rounds=until, why=str(error).replace("\n", "; "))
    known = [value for value in values if value is not None]
    figure = statistics.fmean(known) if len(known) == len(values) else None
    return replace(candidate, figure=figure, rounds=until, why="" if figure is not None else "not finite")


def _figure(folder: Path, until: int, by: str) -> float | None:
    record = next(record for record in read_records(folder / "rounds.jsonl") if record.round == until)
    value = record.eval["global"].get(by)
    return value if value is not None and math.isfinite(value) else None


def _blind(recipe: r.Recipe, every: int) -> r.Recipe:
    """The recipe with nothing in it that is measured for a score."""
    measured = {"every": every, "personal": "never", "keep": "last", "patience": None}
    changes = {"evaluate": recipe.evaluate.model_copy(update=measured), "generation": None}
    return recipe.model_copy(update=changes)


def _place(job: Job) -> Path:
    return job.out / "tune" / job.setting.name / Path(Cell(job.setting, job.method).id).name
