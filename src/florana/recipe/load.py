"""Recipes as TOML files: read, overridden, checked. A misspelt key is refused with the nearest right one.

Nothing is written before a recipe has passed here.
"""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from florana.bounded import read_toml, toml
from florana.errors import RecipeError, nearest
from florana.recipe.data_schema import Generation
from florana.recipe.privacy_checks import require_noise, require_sums
from florana.recipe.renamed import current
from florana.recipe.schema import Recipe
from florana.recipe.strategy_options import check_strategy
from florana.strategy import facts
from florana.strategy.base import Strategy
from florana.strategy.conformance import check_rule
from florana.strategy.custom import is_own, load_rule, plain_name
from florana.strategy.ranks import with_ranks


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `key=value` overrides (dotted keys, TOML values) put over it.

    Raises:
        RecipeError: the file cannot be read or is not TOML, a key or value is wrong, or a combination cannot hold.
    """
    path = Path(path)
    try:
        table = read_toml(path)
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe {path}", fix="give the path of a TOML file; recipes/ has examples"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the recipe {path} is not valid TOML", why=str(error)) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe {path} cannot be read", why=str(error)) from None
    for override in overrides:
        _override(table, override)
    _find_own_methods(table, path.resolve().parent)
    return resolve(check(table, str(path)), path.resolve().parent)


def check(table: Mapping[str, Any], source: str) -> Recipe:
    """The recipe in a table. Raises RecipeError with every fault found, the nearest right key named."""
    recipe = shaped(table, source)
    check_strategy(recipe.strategy, source)
    own = str(recipe.strategy["name"])
    if is_own(own):
        check_rule(load_rule(own), plain_name(own))
    try:
        _check_combinations(recipe, recipe.build_strategy())  # options that no type can tell are refused here too
    except RecipeError as error:
        raise RecipeError(f"{source}: {error.what}", why=error.why, fix=error.fix) from None
    return recipe


def shaped(table: Mapping[str, Any], source: str) -> Recipe:
    """The recipe in a table by its keys and their kinds alone: no strategy is built, no code of its own loaded.

    Args:
        table: of a recipe that was checked before, a finished run's.
        source: what it is called in messages.

    Raises:
        RecipeError: with every fault found, the nearest right key named.
    """
    sections = {key: current(key, value) if isinstance(value, Mapping) else value for key, value in table.items()}
    try:
        return Recipe.model_validate(sections)
    except ValidationError as error:
        faults = [_fault(dict(fault)) for fault in error.errors()]
        raise RecipeError(f"{source}: " + "\n".join(faults)) from None


def generation_settings(task: str, file: Path, overrides: Sequence[str] = ()) -> Generation:
    """The section [generation] without a recipe, for a finished model.

    Args:
        task: the benchmark.
        file: its problems.
        overrides: `key=value`, or `generation.key=value`; paths count from the working folder.

    Raises:
        RecipeError: with every fault found, the nearest right key named.
    """
    table: dict[str, Any] = {}
    for override in overrides:
        _override(table, override.strip().removeprefix("generation."))
    section = current("generation", {**table, "task": task, "file": str(file.resolve())})
    try:
        own = Generation.model_validate(section)
    except ValidationError as error:
        faults = [_fault({**fault, "loc": ("generation", *fault["loc"])}) for fault in error.errors()]
        raise RecipeError(f"--benchmark {task}: " + "\n".join(faults)) from None
    examples = str(Path(own.examples).expanduser().resolve()) if own.examples is not None else None
    return own.model_copy(update={"examples": examples})


def _check_combinations(recipe: Recipe, strategy: Strategy) -> None:
    """What the strategy's own declarations exclude. Raises RecipeError."""
    require_sums(recipe, strategy)
    require_noise(recipe, strategy)
    if recipe.model.client_ranks is not None:
        with_ranks(strategy, {}, recipe.model.scaling_of)
    if recipe.model.variant == "dora" and strategy.facts.base != "stays":
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with model.variant = 'dora'",
            why="it moves the base by a part beside the factors; DoRA divides by the norm of W + scaling B A, in "
            "which that part would be missing",
            fix="set model.variant = 'lora', or choose another strategy (of a study: leave it out of the controls)",
        )
    if recipe.model.rank_pattern and (is_own(recipe.strategy["name"]) or strategy.facts.shape(7)[0] != 7):
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with model.rank_pattern",
            why="it is told one rank for all modules",
            fix="leave the pattern out, or choose another strategy",
        )
    if recipe.generation is not None and not strategy.facts.one_model:
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with [generation]",
            why="its server has no model of its own that could write",
            fix="leave the section out, or choose another strategy",
        )
    chooses = recipe.evaluate.keep == "best" or recipe.evaluate.patience is not None
    if chooses and not strategy.facts.one_model:
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with evaluate.keep = 'best' or evaluate.patience",
            why="its server has no model of its own to measure",
            fix="leave both out, or choose another strategy (of a study: leave it out of the controls)",
        )
    asked = recipe.federation.clients_per_round or recipe.partition.clients
    if strategy.facts.most is not None and asked is not None and asked * recipe.model.rank > strategy.facts.most:
        raise RecipeError(
            f"the strategy '{strategy.name}' takes on clients times rank up to {strategy.facts.most}, and "
            f"{asked} clients of rank {recipe.model.rank} are {asked * recipe.model.rank}",
            why="its step solves dense systems of that size",
            fix="lower federation.clients_per_round or model.rank, or choose other options of it (scope = 'module')",
        )
    if recipe.robust.rule != "none" and strategy.facts.robust.startswith("no"):
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with robust.rule = '{recipe.robust.rule}'",
            why=strategy.facts.robust.removeprefix("no: "),
            fix="set robust.rule = 'none', or choose another strategy (of a study: leave it out of the controls)",
        )
    if recipe.robust.rule != "none" and recipe.model.client_ranks is not None and strategy.facts.up is facts.CORE:
        raise RecipeError(
            f"model.client_ranks does not go with robust.rule = '{recipe.robust.rule}' under '{strategy.name}'",
            why="clients that train different blocks cannot be compared",
            fix="leave one of the two out",
        )
    if strategy.begin != "lora" and recipe.model.quantization != "none":
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with model.quantization = '{recipe.model.quantization}'",
            why="it starts from the base weights themselves, which a quantised base does not have",
            fix="set model.quantization = 'none', or choose another strategy",
        )


def resolve(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with every relative path that exists below `folder` (or that looks like a path) made absolute."""

    def absolute(name: str | None) -> str | None:
        if name is None or name.startswith("package:"):
            return name
        looks = name.startswith((".", "/", "~")) or Path(name).suffix.lower() in {
            ".csv",
            ".tsv",
            ".jsonl",
            ".json",
            ".parquet",
            ".gz",
        }
        place = (folder / Path(name).expanduser()).resolve()
        return str(place) if looks or place.exists() else name

    files = ("train", "test", "test_mismatched", "validation")
    data = recipe.data.model_copy(update={key: absolute(getattr(recipe.data, key)) for key in files})
    model = recipe.model.model_copy(update={key: absolute(getattr(recipe.model, key)) for key in ("base", "adapter")})
    written = recipe.generation
    if written is not None:  # always files: there is no hub here
        paths = {"file": written.file, "examples": written.examples}
        written = written.model_copy(
            update={k: str((folder / Path(v).expanduser()).resolve()) for k, v in paths.items() if v is not None}
        )
    return recipe.model_copy(update={"data": data, "model": model, "generation": written})


def _find_own_methods(table: dict[str, Any], folder: Path) -> None:
    """FILE.py:FUNCTION counts from the recipe's folder too, as a strategy's name and among a study's methods."""

    def found(name: Any) -> Any:
        if not isinstance(name, str) or not is_own(name):
            return name
        file, _, function = name.rpartition(":")
        return f"{(folder / Path(file.strip()).expanduser()).resolve()}:{function}"

    strategy, study = table.get("strategy"), table.get("study")
    if isinstance(strategy, dict) and "name" in strategy:
        strategy["name"] = found(strategy["name"])
    if isinstance(study, dict) and isinstance(study.get("methods"), list):
        study["methods"] = [found(name) for name in study["methods"]]


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, with both values."""

    def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in table.items():
            result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return result

    before, after = flat(old.model_dump()), flat(new.model_dump())
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key.strip()):
        raise RecipeError(f"--set {text!r} is not key=value", fix="for example --set federation.rounds=20")
    put(table, key.strip(), parsed(value))


def parsed(value: str) -> Any:
    """A value as TOML has it; a bare word is a string.

    Examples:
        >>> parsed("1e-3"), parsed("adam")
        (0.001, 'adam')
    """
    try:
        return toml(f"value = {value}")["value"]
    except ValueError:
        return value


def put(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a recipe's table. Raises RecipeError where a part of it is a value, not a table."""
    *path, last = key.split(".")
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"'{key}': '{name}' is a value, not a table")
    table[last] = value


def _fault(fault: dict[str, Any]) -> str:
    path = [str(step) for step in fault["loc"] if not str(step).startswith(("list[", "literal["))]
    where = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{where}': {nearest(path[-1], _keys_beside(path))}"
    if fault["type"] == "missing":
        return f"the key '{where}' is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"'{where}': {message} (it is {fault['input']!r})" if where and fault["type"] != "value_error" else message


def _keys_beside(path: Sequence[str]) -> list[str]:
    """The keys known where an unknown one was found; for a table nobody knows, those of the top."""
    section: type[BaseModel] = Recipe
    for step in path[:-1]:
        annotation = section.model_fields[step].annotation
        for kind in (annotation, *typing.get_args(annotation)):  # a section, or one that may be absent
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                section = kind
    return list(section.model_fields)
