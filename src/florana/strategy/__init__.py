"""The methods by name: one literal table, one file each."""

from __future__ import annotations

from collections.abc import Callable

from florana.strategy import best_rank, fedex_lora, fedit, fedrot, flora_na, lora_fair, oracle
from florana.strategy.base import Strategy

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedit": fedit.build,
    "flora-na": flora_na.build,
    "best-rank": best_rank.build,
    "oracle": oracle.build,
    "fedex-lora": fedex_lora.build,
    "lora-fair": lora_fair.build,
    "fedrot": fedrot.build,
}
"""Name -> the function that builds the strategy from its own options (keyword arguments)."""
