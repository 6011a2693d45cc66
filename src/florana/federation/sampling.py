"""Randomness as a function: of the recipe's seed, the round, and a purpose. Nothing global, nothing to save."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, independent of every other one.

    Examples:
        >>> derive(0, "round", 1) == derive(0, "round", 1), derive(0, "round", 1) == derive(0, "round", 2)
        (True, False)
    """
    words = "\x1f".join(str(word) for word in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def sample(clients: Sequence[str], count: int, seed: int, round_: int) -> list[str]:
    """`count` of the clients for one round, without replacement, sorted; the order of `clients` does not matter.

    Args:
        clients: all clients' names.
        count: how many take part.
        seed: the run's.
        round_: counted from 1.

    Examples:
        >>> sample(["c", "a", "b"], 2, seed=0, round_=1) == sample(["a", "b", "c"], 2, seed=0, round_=1)
        True
    """
    names = sorted(clients)
    rng = np.random.default_rng(derive(seed, "sample", round_))
    chosen = rng.choice(len(names), size=min(count, len(names)), replace=False)
    return sorted(names[index] for index in chosen)
