"""What the strategies with a frozen, factored part have in common."""

from __future__ import annotations

import torch

from florana.errors import RecipeError
from florana.lora.factors import Adapter


def check_residual_rank(rank: int | None) -> None:
    """Raise RecipeError unless the bound on the residual is None or at least 1."""
    if rank is not None and rank < 1:
        raise RecipeError(f"strategy.residual_rank is {rank}, not at least 1", fix="leave it out to keep everything")


def residual_note(residual: Adapter | None) -> dict[str, object]:
    """The largest rank of the residual, for the journal."""
    return {"residual_rank": max((pair.rank for pair in residual.modules.values()), default=0) if residual else 0}


def dtype_of(adapter: Adapter) -> torch.dtype:
    """The type of an adapter's factors."""
    return next(iter(adapter.modules.values())).A.dtype
