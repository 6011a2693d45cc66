"""florana in a Flower app: aggregation that knows LoRA behind Flower's own `Strategy`, and records that keep every bit.

    from florana.flower import FloraNA          # in the place of flwr.serverapp.strategy.FedAvg

The names below are loaded when first used: importing this package loads neither flwr nor torch. Using one without flwr
raises InputError, which names the extra to install.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from florana.errors import InputError

if TYPE_CHECKING:
    from florana.flower.dropin.arrays import pack, unpack
    from florana.flower.dropin.client_helpers import receive, reply
    from florana.flower.dropin.lora_strategy import LoraStrategy
    from florana.flower.dropin.strategies import (
        BestRank,
        FedExLora,
        FedIT,
        FedRot,
        FedSALora,
        FedSVD,
        FfaLora,
        FlexLora,
        Flora,
        FloraNA,
        Florist,
        HetLora,
        LoraFair,
        Oracle,
        RoLora,
    )

_NOT_IN_STRATEGIES = {
    "LoraStrategy": "dropin.lora_strategy",
    "pack": "dropin.arrays",
    "receive": "dropin.client_helpers",
    "reply": "dropin.client_helpers",
    "unpack": "dropin.arrays",
}

__all__ = [
    "BestRank",
    "FedExLora",
    "FedIT",
    "FedRot",
    "FedSALora",
    "FedSVD",
    "FfaLora",
    "FlexLora",
    "Flora",
    "FloraNA",
    "Florist",
    "HetLora",
    "LoraFair",
    "LoraStrategy",
    "Oracle",
    "RoLora",
    "pack",
    "receive",
    "reply",
    "unpack",
]


def require_flwr() -> None:
    """Raise InputError, naming the extra, where flwr is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise InputError(
            "florana.flower needs Flower, and flwr is not installed",
            why="flwr is an extra of florana: its own pins are tight",
            fix="pip install 'florana[flower]'",
        )


def __getattr__(name: str) -> Any:
    if name in __all__:
        require_flwr()
        module = _NOT_IN_STRATEGIES.get(name, "dropin.strategies")
        return getattr(importlib.import_module(f"florana.flower.{module}"), name)
    raise AttributeError(f"module 'florana.flower' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
