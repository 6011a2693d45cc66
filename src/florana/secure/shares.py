"""Shamir's shares of a secret of 16 bytes, over GF(2^128) (Shamir 1979; pycryptodome's)."""

from __future__ import annotations

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

from florana.errors import FederationError


def split(secret: bytes, holders: int, threshold: int) -> list[bytes]:
    """One share for each holder, in their order; any `threshold` of them give the secret, fewer say nothing of it.

    Args:
        secret: 16 bytes.
        holders: how many shares.
        threshold: at least 1, at most `holders`.

    Examples:
        >>> parts = split(b"sixteen bytes ok", 3, 2)
        >>> combined({0: parts[0], 2: parts[2]}, 2)
        b'sixteen bytes ok'
    """
    return [share for _, share in Shamir.split(threshold, holders, secret, ssss=False)]


def combined(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the holders' places (from 0) and their shares.

    Raises:
        FederationError: fewer shares than the threshold.
    """
    if len(shares) < threshold:
        raise FederationError(f"{len(shares)} shares of a secret are there, and {threshold} are needed")
    chosen = sorted(shares.items())[:threshold]
    secret: bytes = Shamir.combine([(place + 1, share) for place, share in chosen], ssss=False)
    return secret
