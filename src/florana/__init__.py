"""florana: federated LoRA fine-tuning whose server step is as exact as the rank allows.

The names below are loaded when first used, so that `import florana` and `florana --help` stay fast.

>>> import florana
>>> florana.best_rank.__module__
'florana.aggregate.best_rank.project'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from florana.adapters.adapter_folder import AdapterCard, read_adapter, write_adapter
    from florana.aggregate.best_rank.project import best_rank
    from florana.aggregate.error import AggregationError, measure
    from florana.aggregate.flora_na.scalars import mix
    from florana.aggregate.mean import mean
    from florana.aggregate.signed import weighted_sum
    from florana.aggregate.stack import stack
    from florana.errors import FederationError, FloranaError, InputError, RecipeError
    from florana.lora.factors import Adapter, Contribution, LoraFactors
    from florana.recipe.load import read_recipe
    from florana.recipe.schema import Recipe
    from florana.report.page import write_report
    from florana.runs.setup import execute, prepare

_HOME = {
    "florana.adapters.adapter_folder": ("AdapterCard", "read_adapter", "write_adapter"),
    "florana.aggregate.error": ("AggregationError", "measure"),
    "florana.aggregate.mean": ("mean",),
    "florana.aggregate.flora_na.scalars": ("mix",),
    "florana.aggregate.best_rank.project": ("best_rank",),
    "florana.aggregate.signed": ("weighted_sum",),
    "florana.aggregate.stack": ("stack",),
    "florana.errors": ("FederationError", "FloranaError", "InputError", "RecipeError"),
    "florana.lora.factors": ("Adapter", "Contribution", "LoraFactors"),
    "florana.recipe.schema": ("Recipe",),
    "florana.recipe.load": ("read_recipe",),
    "florana.report.page": ("write_report",),
    "florana.runs.setup": ("execute", "prepare"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Adapter",
    "AdapterCard",
    "AggregationError",
    "Contribution",
    "FederationError",
    "FloranaError",
    "InputError",
    "LoraFactors",
    "Recipe",
    "RecipeError",
    "best_rank",
    "execute",
    "mean",
    "measure",
    "mix",
    "prepare",
    "read_adapter",
    "read_recipe",
    "stack",
    "weighted_sum",
    "write_adapter",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'florana' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
