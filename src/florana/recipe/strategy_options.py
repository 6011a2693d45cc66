"""A strategy's options as a recipe gives them: the keyword arguments of its `build`, checked by their annotations."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from florana.errors import RecipeError, nearest
from florana.other_names import method_hint
from florana.strategy import STRATEGIES, builder
from florana.strategy.base import Strategy

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_WHOLE = range(-(2**63), 2**63)
"""TOML's whole numbers."""


def check_strategy(table: Mapping[str, Any], source: str) -> None:
    """Raise RecipeError where a table of a strategy's name and options names what is not there, or a wrong value.

    Args:
        table: `name`, and options beside it.
        source: where the table stands, for the message.
    """
    name = table.get("name")
    if not isinstance(name, str):
        raise RecipeError(f"{source}: the key 'strategy.name' is missing", fix=nearest("", STRATEGIES))
    build = builder(name)
    if build is None:
        raise RecipeError(f"{source}: there is no strategy '{name}'", fix=method_hint(name, STRATEGIES))
    given = {key: value for key, value in table.items() if key != "name"}
    options = _options(build)
    for key, value in given.items():
        if key not in options.model_fields:
            hint = nearest(key, options.model_fields) if options.model_fields else f"'{name}' has no options"
            raise RecipeError(f"{source}: unknown key 'strategy.{key}': {hint}")
        if isinstance(value, int) and value not in _WHOLE:
            raise RecipeError(f"{source}: 'strategy.{key}' is {value!r}, not a number of at most 64 bits")
    try:
        options.model_validate(given)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        annotation = options.model_fields[key].annotation
        if typing.get_origin(annotation) is Literal:
            fix = f"one of {', '.join(map(repr, typing.get_args(annotation)))}"
            raise RecipeError(f"{source}: 'strategy.{key}' is {given[key]!r}", fix=fix) from None
        wanted = "a finite number" if float in (annotation, *typing.get_args(annotation)) else "a whole number"
        raise RecipeError(f"{source}: 'strategy.{key}' is {given[key]!r}, not {wanted}") from None


@functools.cache
def _options(build: Callable[..., Strategy]) -> type[BaseModel]:
    """The keyword arguments of `build` as the fields of a model; none of a rule in a file, which has no options."""
    if not inspect.isfunction(build):
        return create_model("Options", __config__=_STRICT)
    hints, parameters = typing.get_type_hints(build), inspect.signature(build).parameters
    fields: dict[str, Any] = {key: (hints[key], parameter.default) for key, parameter in parameters.items()}
    return create_model("Options", __config__=_STRICT, **fields)
