"""The best adapter of a given rank.

    target = sum_u w_u s_u B_u A_u        B_hat, A_hat = argmin_{rank r} || target - s B_hat A_hat ||_F

solved in the small space of the stacked factors (Eckart and Young, 1936): no dense matrix, the same optimum. FlexLoRA
(arXiv 2402.11505) is this answer from a dense target. Of the equivalent pairs, the balanced one is returned:
B = L sqrt(S), A = sqrt(S) V^T, so both factors have the same norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from florana.aggregate import validate
from florana.aggregate.best_rank import exact, power
from florana.aggregate.mean import mean_of_a, mean_of_b
from florana.errors import InputError
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution, LoraFactors


def terms(parts: Sequence[Contribution]) -> Iterator[tuple[str, list[tuple[LoraFactors, float]]]]:
    """Module name -> the pairs of the true weighted sum, each with its weight, one module after the other.

    What clients carried frozen (`Contribution.residual`) belongs to the sum; one that several share enters once, behind
    the clients' own pairs, of which there is one per contribution.
    """
    weights = validate.shares(parts)
    carried: dict[int, tuple[Adapter, float]] = {}
    for part, weight in zip(parts, weights, strict=True):
        if part.residual is not None:
            _, before = carried.get(id(part.residual), (part.residual, 0.0))
            carried[id(part.residual)] = (part.residual, before + weight)
    for name, pairs in validate.matched(parts).items():
        validate.require_finite_factors(parts, name, pairs)
        frozen = [(frozen.modules[name], weight) for frozen, weight in carried.values() if name in frozen.modules]
        yield name, [*zip(pairs, weights, strict=True), *frozen]


def each_target(parts: Sequence[Contribution]) -> Iterator[tuple[str, tuple[linalg.Stack, float, torch.dtype]]]:
    """Module name -> (the true weighted sum as a stack, the output scaling, the dtype), one module after the other."""
    for name, pieces in terms(parts):
        pairs, weights = zip(*pieces, strict=True)
        own = pairs[: len(parts)]
        yield name, (linalg.stack(pairs, weights), validate.output_scaling(own), own[0].A.dtype)


def targets(parts: Sequence[Contribution]) -> dict[str, tuple[linalg.Stack, float, torch.dtype]]:
    """All of `each_target` at once: twice the memory of the factors, for rules that look at several modules."""
    return dict(each_target(parts))


@dataclass(frozen=True, eq=False)
class Task:
    """Module `name` of all `parts`: the best rank-`rank` part of sum_u weights_u * scaling_u * B_u @ A_u.

    `start` is a pair near the answer, or None for the clients' own mean; `tolerance` the excess over the optimal
    error that is allowed, as a share of it.
    """

    parts: Sequence[Contribution]
    name: str
    pairs: Sequence[LoraFactors]
    weights: Sequence[float]
    rank: int
    start: LoraFactors | None
    tolerance: float


Way = Callable[[Task], LoraFactors | None]
"""A way to solve a Task: factors of its rank, or None where this way could not settle it."""


def by_gram(task: Task) -> LoraFactors:
    """The optimum from Gram matrices, or QR where they are too coarse (`exact.nearest`); `florana merge` takes this."""
    validate.require_finite_factors(task.parts, task.name, task.pairs)
    pieces = zip(task.weights, task.pairs, strict=True)
    return exact.nearest(pieces, task.rank, task.pairs[0].A.dtype).pair


def by_qr(task: Task) -> LoraFactors:
    """The optimum by thin QR of both stacks and the SVD of the small core: O((out + in) R^2 + R^3), float64."""
    validate.require_finite_factors(task.parts, task.name, task.pairs)
    part = linalg.kept(linalg.decompose(linalg.stack(task.pairs, task.weights)), task.rank)
    return linalg.balanced(part, validate.output_scaling(task.pairs), task.pairs[0].A.dtype)


def by_power(task: Task, passes: int = 200) -> LoraFactors | None:
    """Near the optimum by block power iteration; None where the tolerance was not reached in that many passes."""
    part = iterated(task, passes)
    if part is None:
        return None
    return linalg.balanced(part, validate.output_scaling(task.pairs), task.pairs[0].A.dtype)


def iterated(task: Task, passes: int = 200) -> linalg.Decomposition | None:
    """Block power iteration (`power.find`) in the factors' own precision, float32 at least.

    None where the tolerance was not reached in that many passes, or where a value is not finite:
    a NaN or an infinity in a factor always reaches T A_0^T (if in B_u or A_u) or the mean, so no pass of its own over
    the clients looks for it.
    """
    scaling = validate.output_scaling(task.pairs)
    if task.start is None:
        B_0 = mean_of_b(task.pairs, task.weights, scaling)
        A_0 = mean_of_a(task.pairs, power.jittered(task.weights))
    else:
        B_0, A_0 = task.start.B, task.start.A
    whole = power.product(task.pairs, task.weights)
    first = whole.times(A_0.to(whole.right).T)
    if not (validate.is_finite(first) and validate.is_finite(B_0)):
        return None
    found = power.find(whole, task.rank, torch.cat([first, B_0.to(first)], dim=1), task.tolerance, passes)
    return found.part if found.settled else None


def cheapest(task: Task) -> LoraFactors:
    """`by_power` where eight of its passes cost less than the Gram matrices; `by_gram` where not, or where it had not
    settled after as many passes as those cost."""
    passes = gram_cost(task) / pass_cost(task, 2 * task.rank)
    if passes > 8:
        return by_power(task, int(passes)) or by_gram(task)
    return by_gram(task)


def gram_cost(task: Task) -> float:
    """The Gram matrices and their eigenvectors in multiply-adds of a float32 product: 5 R k (out + in) + 55 k^3.

    R columns, k = min(R, out, in); all in float64. The constants are measured (benchmarks/aggregation.py prints the
    times).
    """
    total, (out, into) = sum(pair.rank for pair in task.pairs), task.pairs[0].shape
    core = min(total, out, into)
    return 5.0 * total * core * (out + into) + 55.0 * core**3


def pass_cost(task: Task, size: int) -> float:
    """One pass of a block of `size` columns, in the same unit: 2 R b (out + in) + 10 b^2 (out + in) + a fixed part.

    The second term is the block's own algebra in float64; the fixed part is some forty calls on small tensors.
    """
    total, (out, into) = sum(pair.rank for pair in task.pairs), task.pairs[0].shape
    return 2.0 * total * size * (out + into) + 10.0 * size**2 * (out + into) + 5e7


def best_rank(
    parts: Sequence[Contribution],
    rank: validate.Rank,
    *,
    start: Adapter | None = None,
    tolerance: float = 5e-3,
    way: Way = cheapest,
) -> Adapter:
    """The adapter of rank `rank` nearest to the true weighted sum of products, module by module.

    Args:
        parts: one contribution per client; ranks and scalings may differ.
        rank: at least 1, one for all modules or each module's own; where the sum has a lower rank, the factors are
            padded with zeros.
        start: an adapter near the answer (the last broadcast) to start an iteration from; the clients' mean if None.
        tolerance: where a module is large enough to be iterated, its error may exceed the optimum by this share; an
            estimate ends the iteration, see `power`. Small modules are exact whatever it is, and come out with the
            bytes of `florana merge`, as all do under `by_gram`.
        way: `cheapest`, `by_gram`, `by_qr` or `by_power`.

    Raises:
        InputError: the contributions (or the start) do not fit together, or the rank is below 1.

    Examples:
        >>> a = Adapter({"q": LoraFactors(torch.eye(3)[:, :1], torch.eye(2)[:1], 1.0)})
        >>> b = Adapter({"q": LoraFactors(torch.eye(3)[:, 1:2], torch.eye(2)[1:], 1.0)})
        >>> merged = best_rank([Contribution("a", a, 3), Contribution("b", b, 1)], rank=1).modules["q"]
        >>> round(float((merged.B @ merged.A).norm()), 4)
        0.75
    """
    lowest = rank if isinstance(rank, int) else min(rank.values())
    if lowest < 1:
        raise InputError(f"the rank {lowest} is not at least 1")
    if any(part.residual is not None for part in parts):
        return _with_carried(parts, rank)
    weights = validate.shares(parts)
    modules: dict[str, LoraFactors] = {}
    for name, pairs in validate.matched(parts).items():
        task = Task(parts, name, pairs, weights, validate.rank_in(rank, name), _start(name, pairs, start), tolerance)
        modules[name] = way(task) or by_gram(task)
    return Adapter(modules, validate.average_extra(parts))


def _with_carried(parts: Sequence[Contribution], rank: validate.Rank) -> Adapter:
    """The same where clients carried something frozen, which belongs to the sum: by QR."""
    modules = {
        name: linalg.balanced(linalg.kept(linalg.decompose(target), validate.rank_in(rank, name)), scaling, dtype)
        for name, (target, scaling, dtype) in each_target(parts)
    }
    return Adapter(modules, validate.average_extra(parts))


def _start(name: str, pairs: Sequence[LoraFactors], start: Adapter | None) -> LoraFactors | None:
    if start is None:
        return None
    pair = start.modules.get(name)
    if pair is None or pair.shape != pairs[0].shape:
        raise InputError(
            f"the start does not fit: module '{name}' is {pairs[0].shape} in the clients and "
            f"{'absent' if pair is None else pair.shape} in the start"
        )
    return pair
