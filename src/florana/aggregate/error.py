"""How far an aggregation fell from the true sum, and how far the best adapter of its rank would have fallen.

    error = || target - s B_hat A_hat ||_F / || target ||_F          per module and over all modules
    optimum = sqrt(sum_{k > r} sigma_k(target)^2) / || target ||_F   (Eckart and Young, 1936)

Both come from the Gram matrices of the stacked factors, in float64; where those are too coarse for ten digits of a
figure, so for small errors, from thin QR (`best_rank.exact`). One module is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from florana.aggregate.best_rank.exact import judged, relative
from florana.aggregate.best_rank.project import terms
from florana.aggregate.cores import folded
from florana.lora.factors import Adapter, Contribution, LoraFactors


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
        pair, beside = plain.modules[name], residual.modules.get(name) if residual is not None else None
        found = judged(((weight, piece) for piece, weight in pieces), _joined(pair, beside), pair.rank)
        squares[name] = (found.missed, found.least, found.whole)
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


def _joined(pair: LoraFactors, beside: LoraFactors | None) -> LoraFactors:
    """Both as one pair, in float64."""
    if beside is None:
        return pair
    B = torch.cat([one.B.double() * one.scaling for one in (pair, beside)], dim=1)
    return LoraFactors(B=B, A=torch.cat([pair.A.double(), beside.A.double()]), scaling=1.0)
