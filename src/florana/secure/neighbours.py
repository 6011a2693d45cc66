"""Who masks with whom: everybody with everybody up to thirty, above that each with some (Bell et al. 2020).

The circle on which neighbours stand is drawn from the digest of the roster, so nobody chooses it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

COMPLETE = 30
"""Up to so many clients everybody is everybody's neighbour."""


def degree(clients: int) -> int:
    """How many neighbours each has: all others, or about 2 log2 U + 20.

    Examples:
        >>> degree(3), degree(30), degree(300)
        (2, 29, 38)
    """
    if clients <= COMPLETE:
        return clients - 1
    return min(clients - 1, 2 * math.ceil(math.log2(clients)) + 20)


def neighbours(names: Iterable[str], digest: str) -> dict[str, tuple[str, ...]]:
    """Client -> those it masks with and who hold its shares, sorted; mutual.

    Args:
        names: all of the roster.
        digest: of the roster.

    Examples:
        >>> neighbours(["a", "b", "c"], "x")["a"]
        ('b', 'c')
    """
    circle = sorted(names, key=lambda name: hashlib.sha256(f"{digest} {name}".encode()).digest())
    size, half = len(circle), degree(len(circle)) // 2
    if degree(size) == size - 1:
        return {name: tuple(sorted(other for other in circle if other != name)) for name in circle}
    return {
        name: tuple(sorted({circle[(at + step) % size] for step in range(-half, half + 1)} - {name}))
        for at, name in enumerate(circle)
    }


def threshold(holders: int) -> int:
    """How many of a secret's holders (its owner among them) must answer: two thirds.

    A server cannot show two groups of so many clients two lists of survivors unless more than 2 t - U clients help it.

    Examples:
        >>> threshold(3), threshold(10), threshold(39)
        (2, 7, 26)
    """
    return max(2, math.ceil(2 * holders / 3))
