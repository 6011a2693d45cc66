"""Signatures of the clients of a simulation: Ed25519 keys that are made for it and forgotten with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from florana.secure.session import Sign, Verify


@dataclass(frozen=True, eq=False)
class Signer:
    """Who a client is to the others.

    Args:
        name: its name.
        sign: its signature.
        verify: the signatures of those it knows.
    """

    name: str
    sign: Sign
    verify: Verify


def made_up(names: Iterable[str]) -> dict[str, Signer]:
    """Client -> its signatures, all of which all know.

    Examples:
        >>> both = made_up(["a", "b"])
        >>> both["b"].verify("a", b"x", both["a"].sign(b"x")), both["b"].verify("a", b"y", both["a"].sign(b"x"))
        (True, False)
    """
    keys = {name: Ed25519PrivateKey.generate() for name in names}

    def verify(name: str, content: bytes, signature: bytes) -> bool:
        if name not in keys:
            return False
        try:
            keys[name].public_key().verify(signature, content)
        except InvalidSignature:
            return False
        return True

    return {name: Signer(name, key.sign, verify) for name, key in keys.items()}
