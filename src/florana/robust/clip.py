"""Norm clipping: no client moves the model further than the median client (Sun et al., arXiv 1911.07963, section 5).

    share_u = min(1, C / ||D_u||)        C = radius * median_v ||D_v||

for the products, each factor and the heads by themselves. It is the first step, from the last broadcast, of centered
clipping (Karimireddy et al., arXiv 2012.10333, Equation 9). The paper's C is a constant; a multiple of the median needs
no tuning and fewer than half of the clients cannot choose it. Weights stay as they are, nobody is left out.

Assumed: fewer than half are hostile. A hostile share w of the weight moves the sum by at most w C, whatever it sends.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from florana.robust.verdict import Rule, Verdict


def clip(radius: float) -> Rule:
    """The rule.

    Args:
        radius: C in median changes, above 0.
    """

    def rule(found: Mapping[str, Tensor], weights: Sequence[float]) -> Verdict:
        by_kind = {kind: shares(gram, radius) for kind, gram in found.items()}
        return Verdict(weights, [{k: own[u] for k, own in by_kind.items()} for u in range(len(weights))])

    return rule


def shares(gram: Tensor, radius: float) -> list[float]:
    """min(1, C / ||D_u||) from the inner products (U, U) of one kind; all 1 where the median client did not move.

    Examples:
        >>> import torch
        >>> shares(torch.diag(torch.tensor([1.0, 4.0, 100.0])), radius=1.0)
        [1.0, 1.0, 0.2]
    """
    norms = [math.sqrt(max(square, 0.0)) for square in gram.diagonal().tolist()]
    limit = radius * statistics.median_low(norms)
    return [min(1.0, limit / norm) if limit > 0 and norm > 0 else 1.0 for norm in norms]
