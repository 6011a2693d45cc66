"""Which of the equivalent pairs (B G, G^-1 A) goes back: the same product, another start for the next round.

    balanced      B = L sqrt(S / s),   A = sqrt(S / s) V^T        equal norms
    orthonormal   B = L S / s,         A = V^T                    rows of A orthonormal
    aligned       balanced, turned by the orthogonal matrix that brings it nearest to a reference (Procrustes)

L S V^T is the singular value decomposition of the product. Training moves B and A apart from one another, so the
choice matters to what clients learn next, though not to what the server's model is.
"""

from __future__ import annotations

from collections.abc import Callable

from florana import linalg
from florana.aggregate.rotate import align
from florana.factors import Adapter, LoraFactors

Gauge = Callable[[Adapter, Adapter], Adapter]
"""The new adapter and the last broadcast -> the same products in the wanted gauge."""


def balanced(adapter: Adapter, last: Adapter) -> Adapter:
    """As `best_rank` gives it."""
    del last
    return adapter


def orthonormal(adapter: Adapter, last: Adapter) -> Adapter:
    """Every A with orthonormal rows, B with the scale: B A unchanged.

    >>> import torch
    >>> pair = LoraFactors(torch.ones(3, 1), torch.ones(1, 4), 2.0)
    >>> orthonormal(Adapter({"q": pair}), Adapter({"q": pair})).modules["q"].A
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    del last
    return Adapter({name: orthonormal_pair(pair) for name, pair in adapter.modules.items()}, adapter.extra)


def aligned(adapter: Adapter, last: Adapter) -> Adapter:
    """Every pair turned as near as it gets to the last broadcast's, where the ranks are equal; else as it is."""
    modules = {}
    for name, pair in adapter.modules.items():
        reference = last.modules[name]
        modules[name] = align(pair, reference) if pair.rank == reference.rank else pair
    return Adapter(modules, adapter.extra)


def orthonormal_pair(pair: LoraFactors) -> LoraFactors:
    """One pair with orthonormal rows of A (as many as its rank and `in` allow), same product."""
    whole = linalg.kept(linalg.decompose(linalg.stack([pair], [1.0 / pair.scaling])), pair.rank)
    return LoraFactors(
        B=(whole.left * whole.values).to(pair.B.dtype), A=whole.right.to(pair.A.dtype), scaling=pair.scaling
    )
