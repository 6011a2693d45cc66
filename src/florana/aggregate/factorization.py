"""Which of the equivalent factors (B G, G^-1 A) goes back: the same product, another start for the next round.

    balanced      B = L sqrt(S / s),   A = sqrt(S / s) V^T        equal norms
    orthonormal   B = L S / s,         A = V^T                    rows of A orthonormal
    aligned       balanced, turned by the orthogonal matrix that brings it nearest to a reference (Procrustes)

L S V^T is the singular value decomposition of the product. Training moves B and A apart from one another, so the
choice matters to what clients learn next, though not to what the server's model is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from florana.aggregate.rotate import align
from florana.lora import linalg
from florana.lora.factors import Adapter, LoraFactors

DEAD_BELOW = 1e-6
"""A column of B and a row of A both this small beside the largest are rounding: 1e-12 of the product."""

Factorization = Callable[[Adapter, Adapter], Adapter]
"""The new adapter and the last broadcast -> the same products in the wanted factors."""


def balanced(adapter: Adapter, last: Adapter) -> Adapter:
    """As `best_rank` gives it."""
    del last
    return adapter


def orthonormal(adapter: Adapter, last: Adapter) -> Adapter:
    """Every A with orthonormal rows, B with the scale: B A unchanged.

    Examples:
        >>> import torch
        >>> pair = LoraFactors(torch.ones(3, 1), torch.ones(1, 4), 2.0)
        >>> orthonormal(Adapter({"q": pair}), Adapter({"q": pair})).modules["q"].A
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    del last
    return Adapter({name: orthonormal_pair(pair) for name, pair in adapter.modules.items()}, adapter.extra)


def aligned(adapter: Adapter, last: Adapter) -> Adapter:
    """Every pair of factors turned as near as it gets to the last broadcast's, where the ranks are equal; else as it
    is."""
    modules = {}
    for name, pair in adapter.modules.items():
        reference = last.modules[name]
        modules[name] = align(pair, reference) if pair.rank == reference.rank else pair
    return Adapter(modules, adapter.extra)


def revive(adapter: Adapter, last: Adapter) -> Adapter:
    """The adapter with every component that is zero in both factors made trainable: the last row of A, beside B = 0.

    Such components come from a target of fewer components than r (only clients of low ranks took part), in balanced
    factors; no gradient reaches them, in this round or ever. The product stays as it is; a component counts as zero
    where its column and its row are both below `DEAD_BELOW` of the module's largest ones.

    Examples:
        >>> import torch
        >>> pair = LoraFactors(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0], [0.0]]), 1.0)
        >>> last = LoraFactors(torch.tensor([[7.0, 8.0]]), torch.tensor([[5.0], [6.0]]), 1.0)
        >>> again = revive(Adapter({"q": pair}), Adapter({"q": last})).modules["q"]
        >>> again.B, again.A
        (tensor([[2., 0.]]), tensor([[3.],
                [6.]]))
    """
    modules = {name: _alive_pair(pair, last.modules[name].A) for name, pair in adapter.modules.items()}
    return Adapter(modules, adapter.extra, adapter.cores)


def _alive_pair(pair: LoraFactors, rows: Tensor) -> LoraFactors:
    columns, own = pair.B.float().norm(dim=0), pair.A.float().norm(dim=1)  # (r,) each
    dead = (columns <= DEAD_BELOW * columns.max()) & (own <= DEAD_BELOW * own.max())
    if len(rows) < pair.rank or not bool(dead.any()):
        return pair
    B = torch.where(dead[None, :], torch.zeros_like(pair.B), pair.B)
    return LoraFactors(B=B, A=torch.where(dead[:, None], rows[: pair.rank], pair.A), scaling=pair.scaling)


def orthonormal_pair(pair: LoraFactors) -> LoraFactors:
    """Factors with orthonormal rows of A (as many as its rank and `in` allow), same product."""
    whole = linalg.kept(linalg.decompose(linalg.stack([pair], [1.0 / pair.scaling])), pair.rank)
    return LoraFactors(
        B=(whole.left * whole.values).to(pair.B.dtype), A=whole.right.to(pair.A.dtype), scaling=pair.scaling
    )
