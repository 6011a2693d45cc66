"""What a rule says: how much each client counts, and how much of its change.

A rule sees the inner products of the clients' changes (`changes.grams`) and their weights, nothing else: so it cannot
depend on the basis, on the order of the clients or on how the factors are written, and it stands before every strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from florana.robust.changes import distance_gram


@dataclass(frozen=True)
class Verdict:
    """One entry per client, in the order of the Gram matrices.

    Args:
        weights: not negative, of sum 1; a client of weight 0 is left out.
        shares: kind (as of `changes.sizes`) -> the share of its change that counts, at most 1; what is not named counts
            whole.
    """

    weights: Sequence[float]
    shares: Sequence[Mapping[str, float]]


Rule = Callable[[Mapping[str, Tensor], Sequence[float]], Verdict]
"""(the Gram matrices by kind, the weights of sum 1) -> the verdict."""

Weigh = Callable[[Tensor, Sequence[float]], list[float]]
"""(one Gram matrix (U, U) of the changes, the weights of sum 1) -> weights of sum 1."""


def by_distance(weigh: Weigh) -> Rule:
    """The rule that gives weights from one Gram matrix of all kinds, see `changes.distance_gram`."""

    def rule(found: Mapping[str, Tensor], weights: Sequence[float]) -> Verdict:
        return Verdict(weigh(distance_gram(found), weights), [{}] * len(weights))

    return rule


def squared_distances(gram: Tensor) -> Tensor:
    """||D_u - D_v||^2 = K_uu + K_vv - 2 K_uv, not below 0 and 0 on the diagonal.

    Examples:
        >>> import torch
        >>> squared_distances(torch.tensor([[1.0, 0.0], [0.0, 4.0]])).tolist()
        [[0.0, 5.0], [5.0, 0.0]]
    """
    squares = gram.diagonal()
    # each entry is a difference of rounded sums: what is below their rounding is no distance
    noise = 1e-12 * (squares[:, None] + squares[None, :])
    distances = squares[:, None] + squares[None, :] - 2 * gram
    distances = distances.where(distances > noise, 0.0)
    return distances.fill_diagonal_(0.0)


def among(kept: Sequence[bool], weights: Sequence[float]) -> list[float]:
    """The weights of those kept, scaled to sum 1; 0 for the others. Where all that are kept weigh nothing, alike."""
    own = [weight if keep else 0.0 for keep, weight in zip(kept, weights, strict=True)]
    total = sum(own)
    if total <= 0:
        return [1 / sum(kept) if keep else 0.0 for keep in kept]
    return [weight / total for weight in own]


def smallest(values: Sequence[float], count: int) -> list[bool]:
    """Which are among the `count` smallest; those equal to the last of them (to rounding) too.

    So no client is left out for its place in a list, and equal clients are treated alike.

    Examples:
        >>> smallest([3.0, 1.0, 1.0], 1)
        [False, True, True]
    """
    last = sorted(values)[count - 1]
    return [value <= last * (1 + 1e-9) for value in values]
