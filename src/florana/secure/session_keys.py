"""The keys of one session: agreements by X25519, keys derived by HKDF-SHA256, shares sealed by ChaCha20-Poly1305.

Every key is made for one session and one purpose, and used once; so its nonce can be zero.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from florana.errors import FederationError

SEED = 16
"""Bytes of a secret that is shared out: 128 bits, as much as X25519 itself gives."""

PUBLIC = 32
"""Bytes of a public key."""


class Refused(FederationError):  # noqa: N818  (a verdict, not a fault)
    """A client does not take part in what the server asks: it would tell more than a sum, or was tampered with."""


def derived(secret: bytes, purpose: str) -> bytes:
    """32 bytes for one purpose.

    Examples:
        >>> derived(bytes(16), "a") == derived(bytes(16), "a"), derived(bytes(16), "a") == derived(bytes(16), "b")
        (True, False)
    """
    key: bytes = HKDF(SHA256(), 32, salt=None, info=f"florana secure sums: {purpose}".encode()).derive(secret)
    return key


def private_of(seed: bytes) -> X25519PrivateKey:
    """The private key that a seed of `SEED` bytes stands for."""
    return X25519PrivateKey.from_private_bytes(derived(seed, "private key"))


def public_of(private: X25519PrivateKey) -> bytes:
    """The public key, `PUBLIC` bytes.

    Examples:
        >>> len(public_of(private_of(bytes(16))))
        32
    """
    return private.public_key().public_bytes_raw()


def agreed(private: X25519PrivateKey, public: bytes, purpose: str) -> bytes:
    """The 32 bytes that both sides derive for one purpose.

    Raises:
        Refused: the other side's key is none, or one that gives every partner the same.

    Examples:
        >>> one, other = private_of(bytes(16)), private_of(b"x" * 16)
        >>> agreed(one, public_of(other), "masks") == agreed(other, public_of(one), "masks")
        True
    """
    try:
        return derived(private.exchange(X25519PublicKey.from_public_bytes(public)), purpose)
    except ValueError as error:
        raise Refused("a public key of another client is none", why=str(error)) from None


def sealed(key: bytes, content: bytes, about: str) -> bytes:
    """The content, encrypted and authenticated together with what it is about.

    Args:
        key: of this one message.
        content: what nobody on the way may read.
        about: what must be the same when it is opened.
    """
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, about.encode())


def opened(key: bytes, content: bytes, about: str) -> bytes:
    """The inverse of `sealed`.

    Raises:
        Refused: it is not what was sealed.

    Examples:
        >>> opened(bytes(32), sealed(bytes(32), b"share", "a to b"), "a to b")
        b'share'
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), content, about.encode())
    except InvalidTag:
        raise Refused(f"what was sealed ({about}) was changed on the way") from None
