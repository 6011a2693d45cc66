"""Methods as a study calls them: `best-rank[carry_rank=8,server.optimizer=momentum]`, `my_file.py:my_rule`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florana.errors import RecipeError
from florana.recipe.load import parsed
from florana.recipe.renamed import current
from florana.strategy.custom import is_own


@dataclass(frozen=True)
class Method:
    """A method as a study calls it.

    Args:
        label: the name of its rows.
        strategy: the recipe's strategy table.
        settings: dotted keys of the rest of the recipe -> what they are for this method.
    """

    label: str
    strategy: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


def method_of(text: str) -> Method:
    """A method by name, with options in brackets: the strategy's own, or dotted keys of the recipe.

    Examples:
        >>> method_of("best-rank[server.optimizer=momentum]").settings
        {'server.optimizer': 'momentum'}
        >>> method_of("best-rank[carry_rank=8, factorization=aligned]").strategy["carry_rank"]
        8
    """
    found = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[(.*)\])?\s*", text)
    if found is None:
        raise RecipeError(f"{text!r} is no method", fix="for example best-rank, or best-rank[carry_rank=8]")
    name, inner = found[1], found[2] or ""
    options: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in inner.split(","))):
        key, equals, value = (word.strip() for word in pair.partition("="))
        if not equals:
            raise RecipeError(f"the option {pair!r} of '{name}' is not key=value")
        options[key] = parsed(value)
    if is_own(name):
        path, _, function = name.rpartition(":")
        options_of, settings = _parted(options)
        if options_of:
            raise RecipeError(f"a rule of one's own takes no options, and '{text}' has {', '.join(options_of)}")
        own = f"{Path(path).expanduser().resolve()}:{function}"
        return Method(_label(function, options), {"name": own}, settings)
    options = current("strategy", options)
    options_of, settings = _parted(options)
    return Method(_label(name, options), {"name": name, **options_of}, settings)


def _label(name: str, options: Mapping[str, Any]) -> str:
    return name + (f"[{', '.join(f'{k}={v}' for k, v in options.items())}]" if options else "")


def _parted(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The strategy's own options, and the recipe's dotted keys."""
    settings = {key: value for key, value in options.items() if "." in key}
    return {key: value for key, value in options.items() if key not in settings}, settings


def split_methods(text: str) -> list[str]:
    """The methods of a comma-separated list; commas in brackets belong to a method.

    Examples:
        >>> split_methods("fedit, best-rank[carry_rank=8,factorization=aligned]")
        ['fedit', 'best-rank[carry_rank=8,factorization=aligned]']
    """
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
