"""Options of strategies: what is no such number is refused when the recipe is read, option by option."""

from __future__ import annotations

import inspect
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import tomli_w

from florana.errors import RecipeError
from florana.recipe.load import check
from florana.recipe.strategy_options import check_strategy
from florana.strategy import STRATEGIES
from tests.program import florana

OPTIONS = [(name, option) for name, build in STRATEGIES.items() for option in inspect.signature(build).parameters]
NUMBERS = [
    (name, option)
    for name, option in OPTIONS
    if typing.get_origin(typing.get_type_hints(STRATEGIES[name])[option]) is not Literal
]
ANYTHING = [True, False, "8", "", [1], {"a": 1}, math.nan, math.inf, -math.inf, 10**30, -(10**30)]


def refused(name: str, option: str, value: object) -> bool:
    """Whether reading the recipe refuses it: the check by type, or the strategy's own."""
    try:
        check_strategy({"name": name, option: value}, "test")
        STRATEGIES[name](**{option: value})
    except RecipeError as error:
        return option in str(error)
    return False


@pytest.mark.parametrize(("name", "option"), OPTIONS)
@pytest.mark.parametrize("value", ANYTHING, ids=repr)
def test_no_option_takes_what_is_no_such_value(name: str, option: str, value: object) -> None:
    assert refused(name, option, value)


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_numbers_below_zero_and_parts_of_whole_numbers_are_refused(name: str, option: str) -> None:
    assert refused(name, option, -1)
    assert refused(name, option, -1.0)
    annotation = typing.get_type_hints(STRATEGIES[name])[option]
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    assert refused(name, option, 1.0) is (float not in kinds or option == "broadcast_error")


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_the_default_passes_as_a_value(name: str, option: str) -> None:
    default = inspect.signature(STRATEGIES[name]).parameters[option].default
    assert default is None or not refused(name, option, default)


@pytest.mark.parametrize("value", [True, 1.5, "4"])
def test_the_whole_recipe_is_refused_by_name(value: object, recipe_table: dict[str, Any]) -> None:
    recipe_table["strategy"] = {"name": "best-rank", "carry_rank": value}
    with pytest.raises(RecipeError, match=rf"'strategy.carry_rank' is {value!r}, not a whole number"):
        check(recipe_table, "test")


def test_a_whole_number_is_a_number_too() -> None:
    check_strategy({"name": "hetlora", "gamma": 1, "penalty": 0}, "test")
    with pytest.raises(RecipeError, match=r"'strategy.penalty' is True, not a finite number"):
        check_strategy({"name": "lora-fair", "penalty": True}, "test")


@pytest.mark.parametrize(
    ("section", "old", "new", "value"),
    [
        ("strategy", "gauge", "factorization", "aligned"),
        ("strategy", "memory", "carry_rank", 8),
        ("study", "swap_rounds", "fixed_updates_rounds", [1]),
    ],
)
def test_an_old_name_is_understood_and_names_the_new_one(
    section: str, old: str, new: str, value: object, recipe_table: dict[str, Any]
) -> None:
    recipe_table["strategy"] = {"name": "best-rank"}
    asked = {**recipe_table, section: {**recipe_table.get(section, {}), old: value}}
    with pytest.warns(FutureWarning, match=f"'{section}.{old}' is now called '{section}.{new}'"):
        found = check(asked, "test").model_dump()[section][new]
    assert found == value
    with pytest.raises(RecipeError, match="are one key"):
        check({**recipe_table, section: {**asked[section], new: value}}, "test")


def test_an_old_name_is_noted_in_one_line(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["strategy"] = {"name": "best-rank", "memory": -1}
    (tmp_path / "r.toml").write_text(tomli_w.dumps(recipe_table))
    done = florana("run", str(tmp_path / "r.toml"), "--dry-run")
    assert done.returncode == 2
    note, error = done.stderr.splitlines()[:2]
    assert note == "note: 'strategy.memory' is now called 'strategy.carry_rank'; the old name ends with version 0.3"
    assert "strategy.carry_rank is -1" in error
