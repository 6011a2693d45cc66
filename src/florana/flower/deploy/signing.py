"""Signatures of the federation's own documents and messages: ECDSA with SHA-384 on P-384 keys."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

_HOW = ec.ECDSA(hashes.SHA384())


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """The key's signature of some bytes."""
    return key.sign(content, _HOW)


def signed_by(public: object, content: bytes, signature: bytes) -> bool:
    """Whether a signature is one of these bytes by a key; what is no such key has signed nothing."""
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return False
    try:
        public.verify(signature, content, _HOW)
    except InvalidSignature:
        return False
    return True
