"""The geometric median of the changes, by smoothed Weiszfeld steps: RFA (Pillutla et al., arXiv 1912.13445, Alg. 2).

    z = argmin_z sum_u w_u ||z - D_u||        beta_u ~ w_u / max(nu, ||z - D_u||),   z <- sum_u beta_u D_u

z is a weighted mean of the changes, so the weights beta are all that is needed, and with them

    ||z - D_u||^2 = sum_v beta_v d_uv - 1/2 sum_{v,t} beta_v beta_t d_vt,        d_uv = ||D_u - D_v||^2

Assumed: the hostile hold less than half of the weight. The paper stops after three steps; here it goes on until the
weights stand still.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.robust.verdict import squared_distances

STEPS, STILL = 1000, 1e-10


def geometric_median(gram: Tensor, weights: Sequence[float], smoothing: float = 1e-3) -> list[float]:
    """The weights beta of sum 1.

    Args:
        gram: inner products (U, U) of the changes.
        weights: w, of sum 1.
        smoothing: nu, in units of an honest client's distance from the others (`_unit`), above 0; so that nobody is
            divided by nothing.

    Examples:
        >>> line = torch.tensor([0.0, 1.0, 3.0, 4.0, 1000.0])  # the median is 3
        >>> beta = geometric_median(torch.outer(line, line), [0.2] * 5)
        >>> round(float(line @ torch.tensor(beta)), 2)
        3.0
    """
    distances = squared_distances(gram.double())
    own = torch.tensor(weights, dtype=torch.float64)
    beta = own / own.sum()
    floor = smoothing * _unit(distances)
    for _ in range(STEPS if floor > 0 else 0):
        after = own / to_mean(distances, beta).sqrt().clamp_min(floor)
        after = after / after.sum()
        moved, beta = float((after - beta).abs().max()), after
        if moved < STILL:
            break
    return [float(weight) for weight in beta]


def _unit(distances: Tensor) -> float:
    """The least of the clients' median distances from the others: an honest one's, where those are more than half.

    Where half are at one point, the least distance that is none; 0 where all are.
    """
    count = len(distances)
    others = distances[~torch.eye(count, dtype=torch.bool)].reshape(count, -1).sqrt()  # (U, U - 1)
    medians = others.median(dim=1).values if count > 1 else others.new_zeros(1)
    positive = others[others > 0]
    least = float(medians.min())
    return least if least > 0 or not len(positive) else float(positive.min())


def to_mean(distances: Tensor, beta: Tensor) -> Tensor:
    """||z - D_u||^2 for z = sum_u beta_u D_u, from the squared distances (U, U); not below 0."""
    towards = distances @ beta
    return (towards - 0.5 * (beta @ towards)).clamp_min(0.0)
