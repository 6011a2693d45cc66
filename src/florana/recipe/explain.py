"""The keys of a recipe explained, from the schema: for the documentation and the command line."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from florana.errors import RecipeError, nearest
from florana.recipe.schema import Recipe


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        section: of the recipe; empty at the top.
        name: the key's own.
        kind: what it takes, in words.
        default: as TOML writes it; `none` where it may be left out and has no value, empty where it is required.
        meaning: what it does.
    """

    section: str
    name: str
    kind: str
    default: str
    meaning: str

    @property
    def path(self) -> str:
        """As --set names it."""
        return f"{self.section}.{self.name}" if self.section else self.name


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """The recipe's sections in their order; the keys at the top first, without a name."""
    yield "", Recipe
    for name, field in Recipe.model_fields.items():
        for section in _sections_of(field.annotation):
            yield name, section


def keys_of(section: str, model: type[BaseModel]) -> list[Key]:
    """The keys of a section in the order of the schema; sections and the strategy's free table are none.

    Args:
        section: its name.
        model: its schema.
    """
    return [
        Key(section, name, kind_of(field.annotation), _default_of(field), " ".join((field.description or "").split()))
        for name, field in model.model_fields.items()
        if not _sections_of(field.annotation) and not (model is Recipe and name == "strategy")
    ]


def explained(path: str) -> Key:
    """The key behind a path like `train.proximal_mu`.

    Raises:
        RecipeError: there is none; the nearest one is named.

    Examples:
        >>> explained("train.batch_size").default
        '16'
    """
    every = {key.path: key for section, model in sections() for key in keys_of(section, model)}
    if path not in every:
        raise RecipeError(f"a recipe has no key '{path}'", fix=_near(path, every))
    return every[path]


def _near(path: str, every: dict[str, Key]) -> str:
    tails = [key.path for key in every.values() if key.name == path]
    if tails:
        return f"did you mean {' or '.join(tails)}?"
    return nearest(path, every) if len(path) > 3 else "florana recipe lists them all"


def kind_of(annotation: Any) -> str:
    """A type as a reader of TOML would say it.

    Examples:
        >>> kind_of(list[int] | None)
        'list of whole number'
    """
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(inside[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(one) for one in inside if one is not type(None)))
    if origin is list:
        return f"list of {kind_of(inside[0])}"
    if origin is dict:
        return f"table: {kind_of(inside[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, "any")


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "none"
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    options = [annotation, *get_args(annotation)]
    return [one for one in options if isinstance(one, type) and issubclass(one, BaseModel)]
