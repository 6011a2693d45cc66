"""The mean without the farthest: f clients, by their distance from the geometric median, count nothing.

The trimmed mean of the literature (Yin et al., arXiv 1803.01498) trims every coordinate by itself. A product has no
coordinates that a factored adapter shows, and forming it would make it dense; this rule trims whole clients instead,
and so is another one: no bound of that paper is claimed for it.

    keep the n - f clients of the smallest ||D_u - z||,   z the geometric median (`geometric_median`)

Assumed: at most f clients are hostile, n >= 2 f + 1, and they hold less than half of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.errors import InputError
from florana.robust.geometric_median import geometric_median, to_mean
from florana.robust.verdict import Weigh, among, smallest, squared_distances


def trimmed(hostile: int) -> Weigh:
    """The rule.

    Args:
        hostile: f, at least 1.
    """

    def weigh(gram: Tensor, weights: Sequence[float]) -> list[float]:
        count = len(weights)
        if count < fewest(hostile):
            raise InputError(
                f"trimming {hostile} hostile clients needs {fewest(hostile)} clients, and {count} are there",
                fix=f"set federation.min_clients to {fewest(hostile)}",
            )
        beta = torch.tensor(geometric_median(gram, weights), dtype=torch.float64)
        away = to_mean(squared_distances(gram), beta)
        return among(smallest(away.tolist(), count - hostile), weights)

    return weigh


def fewest(hostile: int) -> int:
    """2 f + 1: the honest must be more than half."""
    return 2 * hostile + 1
