"""How far an aggregation fell from the true sum, and how far the best adapter of its rank would have fallen.

    error = || target - s B_hat A_hat ||_F / || target ||_F          per module and over all modules
    optimum = sqrt(sum_{k > r} sigma_k(target)^2) / || target ||_F   (Eckart and Young, 1936)

The difference is formed as one longer stack and measured by QR, so that small errors keep their digits; where the stack
has more columns than the module, the sum is formed in float64. One module is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from florana.aggregate.best_rank.exact import relative
from florana.aggregate.best_rank.project import terms
from florana.aggregate.cores import folded
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution, LoraFactors

COARSE = 1e-9
"""Of the target's square: a smaller rest is not read from its Gram matrix."""


@dataclass(frozen=True)
class ModuleError:
    """Relative figures of one module.

    Args:
        error: || target - result ||_F / || target ||_F of the module.
        optimum: the least error that the rank allows, on the same scale.
        weight: the module's share of the squared norm of all targets.
    """

    error: float
    optimum: float
    weight: float


@dataclass(frozen=True)
class AggregationError:
    """How far a result is from the exact weighted sum, in all and module by module.

    Args:
        error: over all modules: the root of the summed squares, divided by that of the targets.
        optimum: the least error that the rank allows, likewise.
        norm: the Frobenius norm of all targets together.
        modules: module -> its figures.
    """

    error: float
    optimum: float
    norm: float
    modules: Mapping[str, ModuleError]


def measure(
    parts: Sequence[Contribution],
    answer: Adapter,
    residual: Adapter | None = None,
) -> AggregationError:
    """The aggregation error of `answer` against the weighted sum of the contributions.

    Args:
        parts: what was aggregated, with its weights; what they carried frozen belongs to the target.
        answer: what came out; the optimum is that of its rank.
        residual: a frozen part sent along with the answer: it belongs to the answer, not to the optimum's rank.

    Examples:
        >>> import torch
        >>> from florana.lora.factors import LoraFactors
        >>> pair = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 1.0)})
        >>> measure([Contribution("a", pair, 1.0)], pair).error
        0.0
    """
    plain = folded(answer)
    squares: dict[str, tuple[float, float, float]] = {}
    for name, pieces in terms([replace(part, adapter=folded(part.adapter)) for part in parts]):
        pair = plain.modules[name]
        given = [pair, *([residual.modules[name]] if residual is not None and name in residual.modules else [])]
        wide = sum(piece.rank for piece, _ in pieces) >= min(pair.shape)
        squares[name] = (_dense if wide else _factored)(pieces, given, pair.rank)
    total = math.fsum(whole for _, _, whole in squares.values())
    return AggregationError(
        error=relative(math.fsum(missed for missed, _, _ in squares.values()), total),
        optimum=relative(math.fsum(tail for _, tail, _ in squares.values()), total),
        norm=math.sqrt(total),
        modules={
            name: ModuleError(relative(missed, whole), relative(tail, whole), whole / total if total else 0.0)
            for name, (missed, tail, whole) in squares.items()
        },
    )


Squares = tuple[float, float, float]
"""|| target - result ||^2, the squared singular values beyond the rank, || target ||^2."""


def _factored(pieces: Sequence[tuple[LoraFactors, float]], given: Sequence[LoraFactors], rank: int) -> Squares:
    """By one thin QR of either side: the leading columns of its triangle are the triangle of the target's own."""
    pairs, weights = zip(*pieces, strict=True)
    target = linalg.stack(pairs, weights)
    whole = linalg.join(target, linalg.stack(given, [1.0] * len(given)), sign=-1.0)
    left = torch.linalg.qr(whole.left, mode="r").R
    right = torch.linalg.qr(whole.right.T, mode="r").R
    columns = target.left.shape[1]
    values = torch.linalg.svdvals(left[:columns, :columns] @ right[:columns, :columns].T)
    missed = torch.linalg.matrix_norm(left @ right.T)
    return float(missed) ** 2, float(values[rank:].square().sum()), float(values.square().sum())


def _dense(pieces: Sequence[tuple[LoraFactors, float]], given: Sequence[LoraFactors], rank: int) -> Squares:
    """Where the factors have more columns than the module has rows or columns: the sum itself is smaller than they."""
    first = given[0]
    target = torch.zeros(first.shape, dtype=torch.float64, device=first.A.device)
    for pair, weight in pieces:
        target.addmm_(pair.B.double() * (weight * pair.scaling), pair.A.double())
    thin = target if target.shape[0] <= target.shape[1] else target.T
    squared = torch.linalg.eigvalsh(thin @ thin.T).flip(0).clamp_min(0)  # of the Gram matrix: half of the digits
    tail, whole = float(squared[rank:].sum()), float(squared.sum())
    if tail < COARSE * whole:
        tail = float(torch.linalg.svdvals(target)[rank:].square().sum())
    for pair in given:
        target.addmm_(pair.B.double() * -pair.scaling, pair.A.double())
    return float(torch.linalg.matrix_norm(target)) ** 2, tail, whole
