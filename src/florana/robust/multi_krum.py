"""Multi-Krum: those whose neighbours are nearest (Blanchard et al., NeurIPS 2017, "Machine learning with adversaries").

    score_u = sum of ||D_u - D_v||^2 over the n - f - 2 clients v nearest to u

The n - f clients of the smallest scores keep their weights, the others count nothing (the paper averages m of them
alike; weights are florana's). Clients whose scores are equal stay or go together.

Assumed: at most f of n clients are hostile, n >= 2 f + 3, and honest changes are alike: under a strong split of the
data an honest client may be the odd one, and the rule then leaves out what only that client knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.errors import InputError
from florana.robust.verdict import Weigh, among, smallest, squared_distances


def multi_krum(hostile: int) -> Weigh:
    """The rule.

    Args:
        hostile: f, at least 1.
    """

    def weigh(gram: Tensor, weights: Sequence[float]) -> list[float]:
        count = len(weights)
        if count < fewest(hostile):
            raise InputError(
                f"multi-krum with {hostile} hostile needs {fewest(hostile)} clients, and {count} are there",
                fix=f"set federation.min_clients to {fewest(hostile)}",
            )
        return among(smallest(scores(gram, hostile), count - hostile), weights)

    return weigh


def fewest(hostile: int) -> int:
    """2 f + 3: with fewer clients a hostile one can have the best score."""
    return 2 * hostile + 3


def scores(gram: Tensor, hostile: int) -> list[float]:
    """The paper's scores, from the inner products (U, U) of the changes."""
    distances = squared_distances(gram)
    others = distances[~torch.eye(len(gram), dtype=torch.bool)].reshape(len(gram), -1)  # (U, U - 1)
    return [float(value) for value in others.sort(dim=1).values[:, : len(gram) - hostile - 2].sum(dim=1)]
