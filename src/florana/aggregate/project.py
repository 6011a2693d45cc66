"""The best adapter of a given rank, and the exact sum kept in two parts.

    target = sum_u w_u s_u B_u A_u        B_hat, A_hat = argmin_{rank r} || target - s B_hat A_hat ||_F

solved by thin QR of the stacked factors and the SVD of a small core (Eckart and Young, 1936): no dense matrix, the
same optimum. FlexLoRA (arXiv 2402.11505) is this answer from a dense target. Of the equivalent pairs, the balanced
one is returned: B = L sqrt(S), A = sqrt(S) V^T, so both factors have the same norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from florana import linalg
from florana.aggregate import inputs
from florana.errors import InputError
from florana.factors import Adapter, Contribution, LoraFactors


@dataclass(frozen=True, eq=False)
class Split:
    """An exact sum in two parts: the best adapter of the wanted rank, and what it leaves out."""

    adapter: Adapter
    remainder: Adapter


def targets(parts: Sequence[Contribution]) -> dict[str, tuple[linalg.Stack, float, torch.dtype]]:
    """Module name -> (the true weighted sum as a stack, the output scaling, the dtype).

    What clients carried frozen (`Contribution.residual`) belongs to the sum; one that several share enters once.
    """
    weights = inputs.shares(parts)
    carried: dict[int, tuple[Adapter, float]] = {}
    for part, weight in zip(parts, weights, strict=True):
        if part.residual is not None:
            _, before = carried.get(id(part.residual), (part.residual, 0.0))
            carried[id(part.residual)] = (part.residual, before + weight)
    result = {}
    for name, pairs in inputs.columns(parts).items():
        whole = linalg.stack(pairs, weights)
        for residual, weight in carried.values():
            if name in residual.modules:
                whole = linalg.join(whole, linalg.stack([residual.modules[name]], [weight]))
        result[name] = (whole, inputs.output_scaling(pairs), pairs[0].A.dtype)
    return result


def best_rank(parts: Sequence[Contribution], rank: int) -> Adapter:
    """The adapter of rank `rank` nearest to the true weighted sum of products, module by module.

    Args:
        parts: one contribution per client; ranks and scalings may differ.
        rank: at least 1; where the sum has a lower rank, the factors are padded with zeros.

    Raises:
        InputError: the contributions do not fit together, or the rank is below 1.

    >>> a = Adapter({"q": LoraFactors(torch.eye(3)[:, :1], torch.eye(2)[:1], 1.0)})
    >>> b = Adapter({"q": LoraFactors(torch.eye(3)[:, 1:2], torch.eye(2)[1:], 1.0)})
    >>> merged = best_rank([Contribution("a", a, 3), Contribution("b", b, 1)], rank=1).modules["q"]
    >>> round(float((merged.B @ merged.A).norm()), 4)
    0.75
    """
    return split(parts, rank).adapter


def split(parts: Sequence[Contribution], rank: int) -> Split:
    """The true sum as its best rank-r part and a factored remainder: nothing is lost.

    What clients carried frozen belongs to the sum.
    Remainder terms below float32's resolution of the largest singular value are dropped.
    """
    if rank < 1:
        raise InputError(f"the rank {rank} is not at least 1")
    modules: dict[str, LoraFactors] = {}
    remainders: dict[str, LoraFactors] = {}
    for name, (target, scaling, dtype) in targets(parts).items():
        whole = linalg.decompose(target)
        modules[name] = linalg.balanced(linalg.kept(whole, rank), scaling, dtype)
        rest = linalg.left_over(whole, rank, tolerance=torch.finfo(torch.float32).eps / 16)
        remainders[name] = linalg.balanced(rest, 1.0, dtype)
    return Split(Adapter(modules, inputs.average_extra(parts)), Adapter(remainders))
