"""The methods by name: one literal table, one file each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from florana.strategy import (
    best_rank,
    fed_sb,
    fedask,
    fedex_lora,
    fedit,
    fedrot,
    fedsa_lora,
    fedsvd,
    ffa_lora,
    flexlora,
    flora,
    flora_na,
    florist,
    frlora,
    hetlora,
    local_only,
    lora_fair,
    oracle,
    ravan,
    rolora,
)
from florana.strategy.base import Strategy
from florana.strategy.custom import build_own, is_own

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedit": fedit.build,
    "flora-na": flora_na.build,
    "best-rank": best_rank.build,
    "oracle": oracle.build,
    "ffa-lora": ffa_lora.build,
    "fedsa-lora": fedsa_lora.build,
    "rolora": rolora.build,
    "flora": flora.build,
    "fedex-lora": fedex_lora.build,
    "flexlora": flexlora.build,
    "florist": florist.build,
    "hetlora": hetlora.build,
    "fedask": fedask.build,
    "fedsvd": fedsvd.build,
    "lora-fair": lora_fair.build,
    "frlora": frlora.build,
    "fedrot": fedrot.build,
    "fed-sb": fed_sb.build,
    "ravan": ravan.build,
}
"""Name -> the function that builds the strategy from its own options (keyword arguments)."""

CONTROLS: dict[str, Callable[..., Strategy]] = {"local-only": local_only.build}
"""What is no method but stands beside them in comparisons."""


def builder(name: str) -> Callable[..., Strategy] | None:
    """What builds the method, control, or function in a file (FILE.py:FUNCTION) of that name; None if there is none."""
    if is_own(name):
        return functools.partial(build_own, name)
    return (STRATEGIES | CONTROLS).get(name)


def built(table: Mapping[str, Any]) -> Strategy:
    """The strategy of a recipe's table: its name, and its own options beside it.

    Examples:
        >>> built({"name": "flora", "residual_rank": 8}).name
        'flora'

    Raises:
        ValueError: there is none of that name.
    """
    build = builder(table["name"])
    if build is None:
        raise ValueError(f"there is no strategy '{table['name']}'")
    return build(**{key: value for key, value in table.items() if key != "name"})
