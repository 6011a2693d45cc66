"""Masks: ChaCha20's key stream as whole numbers modulo 2^bits; and such numbers packed into bytes."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

Numbers = NDArray[np.uint32]
"""Whole numbers modulo 2^bits."""

_CHUNK = 1 << 16
"""Numbers that are packed at a time: each is spread over 32 bytes meanwhile. A multiple of 8."""


def mask(key: bytes, count: int, bits: int) -> Numbers:
    """`count` numbers, uniform modulo 2^bits: the low bits of each four bytes of the stream.

    Args:
        key: 32 bytes, used for this one mask.
        count: how many.
        bits: 1 to 32.

    Examples:
        >>> numbers = mask(bytes(32), 4, 20)
        >>> len(numbers), bool((numbers < 2**20).all()), bool((numbers == mask(bytes(32), 4, 20)).all())
        (4, True, True)
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32) & low(bits)


def low(bits: int) -> np.uint32:
    """The number whose lowest `bits` bits are ones."""
    return np.uint32((1 << bits) - 1)


def packed(numbers: Numbers, bits: int) -> bytes:
    """The numbers, `bits` bits each, lowest first, one after the other.

    Examples:
        >>> packed(np.array([1, 2], dtype=np.uint32), 20).hex()
        '0100200000'
        >>> len(packed(np.zeros(8, dtype=np.uint32), 20))
        20
    """
    parts = []
    for start in range(0, len(numbers), _CHUNK):
        chunk = np.ascontiguousarray(numbers[start : start + _CHUNK], dtype="<u4")
        spread = np.unpackbits(chunk.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")[:, :bits]
        parts.append(np.packbits(spread.ravel(), bitorder="little").tobytes())
    return b"".join(parts)


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many packed numbers.

    Examples:
        >>> packed_size(3, 20)
        8
    """
    return -(-count * bits // 8)


def unpacked(content: bytes, count: int, bits: int) -> Numbers:
    """The inverse of `packed`. Raises ValueError where the bytes are not as many.

    Examples:
        >>> unpacked(packed(np.array([5, 2**20 - 1], dtype=np.uint32), 20), 2, 20).tolist()
        [5, 1048575]
    """
    if len(content) != packed_size(count, bits):
        raise ValueError(f"{len(content)} bytes, not the {packed_size(count, bits)} of {count} numbers of {bits} bits")
    step = _CHUNK * bits // 8
    result = np.zeros(count, dtype=np.uint32)
    for number, start in enumerate(range(0, len(content), step)):
        here = min(_CHUNK, count - number * _CHUNK)
        flat = np.unpackbits(np.frombuffer(content[start : start + step], dtype=np.uint8), bitorder="little")
        whole = np.zeros((here, 32), dtype=np.uint8)
        whole[:, :bits] = flat[: here * bits].reshape(here, bits)
        numbers = np.packbits(whole, axis=1, bitorder="little").view("<u4").ravel()
        result[number * _CHUNK : number * _CHUNK + here] = numbers
    return result
