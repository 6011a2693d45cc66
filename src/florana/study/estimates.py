"""What seeds say of a figure: its mean with a 95 % interval, and differences paired by seed.

    mean +- t_{0.975, n-1} s / sqrt(n)

With few seeds an interval is wide: that is what few seeds can say.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

FEWEST = 3
"""Seeds, for an interval or a test."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval; of fewer than three seeds with its range: t of one degree of freedom says
    nothing.

    Args:
        mean: over seeds.
        half: half the width of its 95 % interval; None for fewer than three seeds.
        seeds: how many seeds.
        low: the smallest of fewer than three, None for more and for one.
        high: the largest, likewise.
    """

    mean: float
    half: float | None
    seeds: int
    low: float | None = None
    high: float | None = None


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """The mean and its interval, of the values that are there.

    Examples:
        >>> estimate([1.0, 2.0, 3.0, None]).half.__round__(3)
        2.484
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Estimate(mean, None, 1)
    if len(known) < FEWEST:
        return Estimate(mean, None, len(known), min(known), max(known))
    spread = statistics.stdev(known) / math.sqrt(len(known))
    _, upper = stats.t.interval(0.95, len(known) - 1, scale=spread) if spread > 0 else (0.0, 0.0)
    return Estimate(mean, float(upper), len(known))


def paired(
    values: Mapping[int, float | None], reference: Mapping[int, float | None]
) -> tuple[Estimate | None, float | None]:
    """The differences of the seeds that both have, and the p-value of the paired t-test (None below three seeds)."""
    differences = [
        value - other
        for seed, value in values.items()
        if value is not None and (other := reference.get(seed)) is not None
    ]
    found = estimate(differences)
    if found is None or found.half is None:
        return found, None
    if len(set(differences)) == 1:  # a test divides by their spread
        return found, 1.0 if found.mean == 0 else 0.0
    t = found.mean / (statistics.stdev(differences) / math.sqrt(found.seeds))
    return found, float(2 * stats.t.sf(abs(t), found.seeds - 1))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """p-values corrected for being m comparisons that were declared together (Holm 1979): with the p-values in
    ascending order,

        adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j))

    The chance of calling any difference real that is none stays below what one comparison's would be.

    Args:
        p_values: name -> p; None where there was no test, which still counts as one of the m.

    Examples:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    count, highest = len(p_values), 0.0
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    for place, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (count - place) * p))
        adjusted[name] = highest
    return adjusted
