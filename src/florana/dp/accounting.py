"""Epsilon of what was released, and the noise that fits a budget; dp-accounting does the arithmetic.

One release is a number of steps of the Poisson-subsampled Gaussian mechanism (DP-SGD, Abadi et al. 2016): in each step
every row is taken with the probability q, its gradient is clipped to C, and the sum gets noise of the standard
deviation sigma C. Neighbours are data in which one row is present or empty; the number of rows is public.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from florana.errors import RecipeError

Accountant = Literal["pld", "rdp"]
"""pld: privacy loss distributions, tight; rdp: Renyi's divergences, a looser bound that other papers report."""

INTERVAL = 1e-3
"""Of the discretised privacy losses, rounded up: within 0.2 % of an interval ten times as fine, and ten times as
fast."""

ORDERS = (*range(2, 64), 80, 128, 256, 512, 1024)
"""Of Renyi's divergences: whole numbers, at which the sum that gives them is finite."""

CLOSE = 0.997
"""The share of epsilon that a run of all its rounds spends at least: no noise is looked for that spends more."""

LITTLE = 0.05
"""A noise multiplier below which no epsilon means much."""

MOST_NOISE = 1e6
"""A noise multiplier beyond which nothing is left of a gradient: a budget that needs more cannot be had."""


@dataclass(frozen=True)
class Budget:
    """What may be spent in all.

    Args:
        epsilon: above 0.
        delta: above 0, far below 1 / rows.
        accountant: how it is counted.
    """

    epsilon: float
    delta: float
    accountant: Accountant = "pld"


@dataclass(frozen=True)
class Mechanism:
    """Steps of one kind.

    Args:
        rate: q, the probability with which a row is in a step; 1 where all are.
        noise_multiplier: sigma, the noise's standard deviation over the clip.
        steps: how many.
    """

    rate: float
    noise_multiplier: float
    steps: int


def epsilon_of(spent: Sequence[Mechanism], delta: float, accountant: Accountant = "pld") -> float:
    """The smallest epsilon, as far as the accountant can tell, for which all of it is (epsilon, delta)-private.

    Args:
        spent: what was released, in any order.
        delta: above 0.
        accountant: see `Accountant`.

    Examples:
        >>> round(epsilon_of([Mechanism(0.01, 1.0, 500)] * 2, 1e-5), 2)
        1.83
        >>> epsilon_of([], 1e-5)
        0.0
    """
    steps = Counter[tuple[float, float]]()
    for kind in spent:
        steps[kind.rate, kind.noise_multiplier] += kind.steps
    parts = tuple(sorted((*kind, count) for kind, count in steps.items() if count))
    return _epsilon(parts, delta, accountant) if parts else 0.0


def noise_for(rate: float, steps: int, budget: Budget) -> float:
    """The smallest noise multiplier with which so many steps stay within the budget, rounded up to four digits.

    Args:
        rate: q, in (0, 1].
        steps: at least 1.
        budget: what may be spent.

    Raises:
        RecipeError: no noise is enough.

    Examples:
        >>> sigma = noise_for(0.01, 1000, Budget(1.83, 1e-5))
        >>> 0.99 < sigma < 1.01, epsilon_of([Mechanism(0.01, sigma, 1000)], 1e-5) <= 1.83
        (True, True)
    """
    return _noise(rate, steps, budget.epsilon, budget.delta, budget.accountant)


@functools.lru_cache(maxsize=4096)
def _epsilon(parts: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    # next to no noise: the looser bound, where a distribution of losses would not fit into memory
    accounts = _accountant("rdp" if min(sigma for _, sigma, _ in parts) < LITTLE else accountant)
    for rate, sigma, steps in parts:
        accounts.compose(_event(rate, sigma, steps))
    return float(accounts.get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def _noise(rate: float, steps: int, epsilon: float, delta: float, accountant: Accountant) -> float:
    from dp_accounting import LowerEndpointAndGuess, calibrate_dp_mechanism

    def event(sigma: float) -> Any:
        return _event(rate, sigma, steps)

    def rounded(sigma: float) -> float:
        digits = 3 - math.floor(math.log10(sigma))
        return float(math.ceil(sigma * 10**digits) / 10**digits)

    with _quiet():
        try:
            bracket = LowerEndpointAndGuess(0.05, 1.0)
            sigma = calibrate_dp_mechanism(lambda: _accountant("rdp"), event, epsilon, delta, bracket, tol=1e-3)
        except Exception as error:  # the library has errors of its own for each way of not finding any
            raise _unreachable(rate, steps, epsilon, delta, str(error)) from None
    if not sigma < MOST_NOISE:
        raise _unreachable(rate, steps, epsilon, delta, f"it would take noise of {sigma:.3g} times the clip")
    sigma = rounded(sigma)
    seen = {sigma: _epsilon(((rate, sigma, steps),), delta, accountant)}
    slope = 1.2  # of log epsilon over -log sigma, at first; then as measured
    for _ in range(12):
        if CLOSE * epsilon <= seen[sigma] <= epsilon:
            break
        after = rounded(sigma * min(2.0, max(0.5, (2 * seen[sigma] / ((1 + CLOSE) * epsilon)) ** (1 / slope))))
        if after in seen:
            break
        seen[after] = _epsilon(((rate, after, steps),), delta, accountant)
        if 0 < seen[after] != seen[sigma] > 0:
            slope = max(0.2, math.log(seen[sigma] / seen[after]) / math.log(after / sigma))
        sigma = after
    fits = [tried for tried, cost in seen.items() if cost <= epsilon]
    if not fits:
        raise _unreachable(rate, steps, epsilon, delta, "the accountant's rounding alone costs more")
    return min(fits)


def _accountant(name: Accountant) -> Any:
    from dp_accounting import pld, rdp

    if name == "rdp":
        return rdp.RdpAccountant(ORDERS)
    return pld.PLDAccountant(value_discretization_interval=INTERVAL)


def _event(rate: float, sigma: float, steps: int) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    once = GaussianDpEvent(sigma)
    return SelfComposedDpEvent(once if rate >= 1 else PoissonSampledDpEvent(rate, once), steps)


class _quiet:  # noqa: N801  (a context like any other)
    """The library warns of each order that it leaves out on the way."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("absl").setLevel(self._level)


def _unreachable(rate: float, steps: int, epsilon: float, delta: float, why: str) -> RecipeError:
    return RecipeError(
        f"no noise makes {steps} steps over {rate:.3g} of the rows ({epsilon}, {delta})-private",
        why=why.splitlines()[0] if why else "",
        fix="raise privacy.epsilon, or lower federation.rounds or train.steps",
    )
