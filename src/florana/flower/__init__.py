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
    from florana.flower.arrays import pack, unpack
    from florana.flower.following import receive, reply
    from florana.flower.lora_strategy import LoraStrategy
    from florana.flower.strategies import (
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

_HOME = {
    "florana.flower.arrays": ("pack", "unpack"),
    "florana.flower.following": ("receive", "reply"),
    "florana.flower.lora_strategy": ("LoraStrategy",),
    "florana.flower.strategies": (
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
        "Oracle",
        "RoLora",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

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
    if name in _MODULE_OF:
        require_flwr()
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'florana.flower' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
