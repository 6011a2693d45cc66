"""The epsilon that a run has at least, from guesses at who was in it (Steinke, Nasr and Jagielski 2023).

Of m rows each was in the run with probability 1/2, on its own. Somebody who saw what the run released guesses r of
them, and v guesses are right. If the run is (epsilon, delta)-private, then (their theorem 5.2)

    P[at least v right] <= P[W >= v] + 2 m delta max_{1 <= i <= v} P[v > W >= v - i] / i,    W ~ Binomial(r, q)

with q = e^epsilon / (e^epsilon + 1). An epsilon for which that is below 5 % is not what the run has: it has more.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def least_epsilon(guesses: int, right: int, rows: int, delta: float, error: float = 0.05) -> float:
    """The epsilon that the run has at least, but for a probability `error`; 0 where nothing can be said.

    Args:
        guesses: r, fixed before any is made.
        right: v of them.
        rows: m.
        delta: of the privacy that is claimed.
        error: the probability with which more than the truth is said.

    Examples:
        >>> round(least_epsilon(100, 100, 200, 0.0), 2), round(least_epsilon(100, 70, 200, 0.0), 2)
        (3.49, 0.47)
        >>> least_epsilon(100, 52, 200, 1e-5)
        0.0
    """
    low, high = 0.0, 1.0
    if chance(guesses, right, rows, 0.0, delta) >= error:
        return 0.0
    while chance(guesses, right, rows, high, delta) < error:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(guesses, right, rows, middle, delta) < error else (low, middle)
    return low


def chance(guesses: int, right: int, rows: int, epsilon: float, delta: float) -> float:
    """The bound above: the most that so many right guesses can have as their probability.

    Examples:
        >>> round(chance(10, 9, 20, 0.0, 0.0), 4)
        0.0107
    """
    q = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, q))
    if delta == 0 or right == 0:
        return tail
    below = np.cumsum(stats.binom.pmf(right - np.arange(1, right + 1), guesses, q))  # P[v > W >= v - i], i = 1 .. v
    return min(1.0, tail + 2 * rows * delta * float((below / np.arange(1, right + 1)).max()))
