"""A run that starts from an adapter there is: of any PEFT origin, of the ranks and scalings that the recipe says."""

from __future__ import annotations

import math
from pathlib import Path

from florana.adapters.adapter_folder import read_adapter
from florana.adapters.hub import adapter_folder
from florana.aggregate.error import measure
from florana.aggregate.stack import combined
from florana.errors import InputError, RecipeError
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy.base import State, Strategy
from florana.train.finished import adapter_in

SAME = 1e-4
"""How far, relative, a first broadcast may be from what the run is to start from."""


def start_from(name: str, own: Adapter) -> Adapter:
    """The adapter as a start, in float32.

    Args:
        name: its folder (or a run's), or a hub name.
        own: what the run would start from otherwise: the modules, ranks, scalings and whole tensors to be met.

    Raises:
        InputError: it cannot be read, adapts other modules, or has other ranks, scalings or heads.
    """
    place = adapter_in(adapter_folder(Path(name)))
    found, _ = read_adapter(place)
    if found.modules.keys() != own.modules.keys():
        apart = sorted(found.modules.keys() ^ own.modules.keys())
        raise InputError(
            f"model.adapter {place} adapts other modules than the recipe: {', '.join(apart[:3])}",
            fix="set model.target_modules to the adapter's own, and model.base to the model that it was trained on",
        )
    for module, pair in found.modules.items():
        mine = own.modules[module]
        if pair.shape != mine.shape:
            raise InputError(
                f"module '{module}' is {pair.shape} in {place}, and {mine.shape} in the base model",
                fix="give the base model that the adapter was trained on",
            )
        if pair.rank != mine.rank or not math.isclose(pair.scaling, mine.scaling, rel_tol=1e-6):
            raise InputError(
                f"module '{module}' has rank {pair.rank} and scaling {pair.scaling:g} in {place}, the recipe says "
                f"rank {mine.rank} and scaling {mine.scaling:g}",
                fix=f"set model.rank = {pair.rank} and model.alpha = {pair.scaling * pair.rank:g} (rank_pattern and "
                "alpha_pattern where modules differ)",
            )
    for key, tensor in found.extra.items():
        if key not in own.extra or own.extra[key].shape != tensor.shape:
            here = tuple(own.extra[key].shape) if key in own.extra else "none"
            raise InputError(
                f"the adapter {place} has '{key}' of shape {tuple(tensor.shape)}, the run's model has {here}",
                why="it was trained for other classes, or another task",
            )
    modules = {
        module: LoraFactors(pair.B.float(), pair.A.float(), own.modules[module].scaling)
        for module, pair in found.modules.items()
    }
    return Adapter(modules, {**own.extra, **{key: tensor.float() for key, tensor in found.extra.items()}})


def require_begun(strategy: Strategy, begun: State, start: Adapter) -> None:
    """Raise RecipeError where a strategy's first state is not the adapter that it was given: it begins anew.

    Args:
        strategy: the strategy.
        begun: what its `init` made.
        start: the adapter that was given.
    """
    told = combined(begun.adapter, begun.residual)
    if begun.adapter.cores or measure([Contribution("start", Adapter(start.modules), 1.0)], told).error > SAME:
        raise RecipeError(
            f"the strategy '{strategy.name}' cannot start from model.adapter",
            why="it begins with factors of its own",
            fix="leave out model.adapter, or take best-rank, flora-na, fedit, ...",
        )
