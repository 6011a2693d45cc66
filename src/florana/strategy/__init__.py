"""The methods by name: one literal table, one file each."""

from __future__ import annotations

from collections.abc import Callable

from florana.strategy import best_rank, fedit, flora_na, oracle
from florana.strategy.base import Strategy

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedit": fedit.build,
    "flora-na": flora_na.build,
    "best-rank": best_rank.build,
    "oracle": oracle.build,
}
"""Name -> the function that builds the strategy from its own options (keyword arguments)."""
