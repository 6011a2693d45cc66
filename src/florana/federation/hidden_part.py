"""A client's own noise in secure sums: its part of a sum is cut and noisy before it is masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from florana.dp.noise import Draws
from florana.strategy.base import Named


@dataclass(frozen=True, eq=False)
class Hiding:
    """What a client does to its parts.

    Args:
        clip: C, the most that a part of a sum has.
        spread: the noise's standard deviation in each number. Of n clients each with spread^2, what all but one have
            drawn is as much as sigma C: even a client that takes its own noise off a sum sees no less.
        begin: (round, attempt, trip) -> draws; it writes down what the part costs first, and raises BudgetSpent where
            that is more than is left.
        require: raises BudgetSpent where so many parts are more than is left.
        spent: epsilon of all its parts so far.
    """

    clip: float
    spread: float
    begin: Callable[[int, int, int], Draws]
    require: Callable[[int], None]
    spent: Callable[[], float]


def spread_of(multiplier: float, clip: float, minimum: int) -> float:
    """sigma C / sqrt(n - 1), n the fewest clients of a sum.

    Examples:
        >>> spread_of(4.0, 0.5, 5)
        1.0
    """
    return multiplier * clip / math.sqrt(minimum - 1)


REACH = 7.0
"""Standard deviations of noise that a number has room for; the few beyond are cut, which tells nothing more."""


def room(bound: float, clip: float, spread: float) -> float:
    """The most that a number of a noisy part can have, of one that training can move by `bound`."""
    return min(bound, clip) + REACH * spread


def hidden(changes: Named, bounds: Mapping[str, float], clip: float, spread: float, draws: Draws) -> dict[str, Tensor]:
    """d min(1, C / ||d||) + spread z, all tensors one vector, each number cut to its bound.

    Args:
        changes: name -> what the client would send.
        bounds: name -> the most that a number can have (`room`).
        clip: C.
        spread: of the noise.
        draws: where z comes from.
    """
    size = math.hypot(*(float(tensor.double().norm()) for tensor in changes.values()))
    scale = min(1.0, clip / max(size, 1e-300))
    return {
        name: (scale * changes[name].double() + spread * draws.normal(*changes[name].shape)).clamp(
            -bounds[name], bounds[name]
        )
        for name in sorted(changes)
    }
