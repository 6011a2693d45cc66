"""No client outvotes all others: shares are capped, and what is above the cap goes to the others.

    w_u <- min(c, k w_u)      with the k >= 1 at which they sum to 1        (water-filling)

so that those below the cap keep their proportions. Where the cap is below an equal share, all are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def usual(clients: int) -> float:
    """The cap where a recipe names none: one half, and with more than twenty clients ten equal shares.

    Of three clients the largest may weigh as much as the other two; of a hundred, a tenth. One and two clients are not
    capped: half of two would be the uniform weighting, which is another objective.

    Examples:
        >>> [usual(clients) for clients in (2, 3, 20, 100)]
        [1.0, 0.5, 0.5, 0.1]
    """
    return 1.0 if clients < 3 else min(0.5, 10 / clients)


def usual_under_a_rule(clients: int) -> float:
    """The cap where a robust rule stands before the strategy: a fifth above an equal share.

    Numbers of rows are claims, and a median of weighted clients is that of the weight: so one of three must stay below
    one half, and a fifth of many below a quarter, whatever they claim.

    Examples:
        >>> [round(usual_under_a_rule(clients), 2) for clients in (3, 10)]
        [0.4, 0.12]
    """
    return min(1.0, 1.2 / clients)


def capped(weights: Mapping[str, float], most: float) -> dict[str, float]:
    """The shares, none above `most` (or above an equal share, where that is larger); of sum 1.

    Examples:
        >>> {name: round(w, 3) for name, w in capped({"a": 0.8, "b": 0.15, "c": 0.05}, 0.5).items()}
        {'a': 0.5, 'b': 0.375, 'c': 0.125}
    """
    total = math.fsum(weights.values())
    shares = {client: weight / total for client, weight in weights.items()}
    if all(share <= most for share in shares.values()):
        return dict(weights)
    most = max(most, 1 / len(shares))
    full: set[str] = set()
    while True:
        free = math.fsum(share for client, share in shares.items() if client not in full)
        grown = (1 - most * len(full)) / free if free > 0 else 0.0
        over = {c for c, share in shares.items() if c not in full and share * grown > most * (1 + 1e-12)}
        if not over:
            return {client: most if client in full else share * grown for client, share in shares.items()}
        full |= over
