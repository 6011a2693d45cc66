"""Random draws that nobody can repeat without the key: ChaCha20's stream as coin flips and as normal numbers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Draws:
    """A stream of draws. The same key gives the same ones; without it they cannot be told from chance.

    Args:
        key: 32 bytes, for one training: at a site from the system's own generator.
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher  # an extra's package
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def chosen(self, rows: int, rate: float) -> list[int]:
        """Poisson sampling: each row with the probability `rate`, on its own.

        Examples:
            >>> len(Draws(bytes(32)).chosen(10_000, 0.25)), Draws(bytes(32)).chosen(3, 1.0)
            (2384, [0, 1, 2])
        """
        return np.flatnonzero(self._uniform(rows) < rate).tolist()

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float64: the inverse of the distribution function, of uniform numbers.

        Examples:
            >>> drawn = Draws(bytes(32)).normal(200, 500)
            >>> abs(float(drawn.mean())) < 0.01, abs(float(drawn.std()) - 1) < 0.01
            (True, True)
        """
        count = int(np.prod(shape, dtype=np.int64))
        drawn: Tensor = torch.special.ndtri(torch.from_numpy(self._uniform(count)))
        return drawn.reshape(shape)

    def seed(self) -> int:
        """A seed for another generator, below 2^63.

        Examples:
            >>> Draws(bytes(32)).seed() == Draws(bytes(32)).seed() != Draws(bytes([1] * 32)).seed()
            True
        """
        return int.from_bytes(self._stream.update(bytes(8)), "little") >> 1

    def _uniform(self, count: int) -> NDArray[np.float64]:
        """The middles of 2^52 equal parts of (0, 1): never 0 and never 1."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8") >> np.uint64(12)
        return (words.astype(np.float64) + 0.5) * 2.0**-52
