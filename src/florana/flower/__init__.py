"""florana in a Flower app: aggregation that knows LoRA behind Flower's own `Strategy`, and records that keep every bit.

    from florana.flower import FloraNA          # in the place of flwr.serverapp.strategy.FedAvg

The public names stand in `__init__.pyi`, and are loaded when first used: importing this package loads neither flwr nor
torch. Using one without flwr raises InputError, which names the extra to install.
"""

import importlib.util
from typing import Any

import lazy_loader

from florana.errors import InputError

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


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
    return _load(name)
