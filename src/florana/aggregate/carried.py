"""Sums of factored parts, recompressed: the frozen residual of the methods whose base moves.

The dense matrix that these methods add to the base weights is kept as a product of two thin factors of as few
components as it takes, complete at all times, so that quantised bases keep working and a client that was absent needs
nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from florana.aggregate.best_rank.truncate import NEGLIGIBLE
from florana.lora import linalg
from florana.lora.factors import Adapter, LoraFactors


def recompressed(sums: Mapping[str, linalg.Stack], rank: int | None, dtype: torch.dtype) -> Adapter | None:
    """The sums in as few components as float32 resolves, at most `rank`; None where all of them are zero. Scaling 1."""
    modules: dict[str, LoraFactors] = {}
    for name, product in sums.items():
        whole = linalg.decompose(product)
        significant = int((whole.values > NEGLIGIBLE * whole.values[0]).sum())
        end = significant if rank is None else min(rank, significant)
        if end:
            modules[name] = linalg.balanced(linalg.between(whole, 0, end), 1.0, dtype)
    return Adapter(modules) if modules else None


def added(
    first: Adapter | None, more: Adapter | None, rank: int | None, dtype: torch.dtype, *, less: Adapter | None = None
) -> Adapter | None:
    """`first + more - less` as products, recompressed; None counts as zero.

    Examples:
        >>> from florana.lora.factors import LoraFactors
        >>> one = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 2.0)})
        >>> both = added(one, one, None, torch.float32, less=None)
        >>> both.modules["q"].rank, round(float((both.modules["q"].B @ both.modules["q"].A)[0, 0]), 4)
        (1, 4.0)
    """
    sums: dict[str, linalg.Stack] = {}
    for adapter, sign in ((first, 1.0), (more, 1.0), (less, -1.0)):
        for name, pair in adapter.modules.items() if adapter is not None else ():
            product = linalg.stack([pair], [sign])
            sums[name] = linalg.join(sums[name], product) if name in sums else product
    return recompressed(sums, rank, dtype)
