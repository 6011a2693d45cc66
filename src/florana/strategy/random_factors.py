"""Random factors that a strategy itself draws: seeded by the adapter at hand, so by the recipe, and never repeated.

A strategy sees no recipe and keeps no generator: the digest of the factors A it holds seeds the next draw, which gives
other factors, whose digest seeds the one after it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from florana.errors import InputError
from florana.lora.factors import Adapter


def choice(seed: int, round_: int, client: str, count: int) -> tuple[int, ...]:
    """The numbers below `count` in a random order of that seed, round and client.

    Examples:
        >>> sorted(choice(7, 1, "client-0", 4))
        [0, 1, 2, 3]
    """
    digest = hashlib.sha256(f"{seed}\x1f{round_}\x1f{client}".encode())
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
    return tuple(torch.randperm(count, generator=generator).tolist())


def generator_of(adapter: Adapter, purpose: str) -> torch.Generator:
    """A generator seeded by the adapter's factors A and a purpose."""
    digest = hashlib.sha256(purpose.encode())
    for name, pair in adapter.modules.items():
        digest.update(name.encode())
        digest.update(pair.A.detach().cpu().contiguous().double().numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)


def like(A: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """A Gaussian matrix of A's shape and dtype with that standard deviation."""
    return (spread * torch.randn(A.shape, generator=generator, dtype=torch.float64)).to(A.dtype)


def orthonormal_columns(rows: int, columns: int, generator: torch.Generator, what: str) -> Tensor:
    """A random (rows, columns) matrix with orthonormal columns, float64.

    Raises:
        InputError: more columns than rows.
    """
    if columns > rows:
        raise InputError(f"{what}: {columns} orthonormal directions do not fit into {rows}", fix="lower the rank")
    drawn: Tensor = torch.linalg.qr(torch.randn((rows, columns), generator=generator, dtype=torch.float64)).Q
    return drawn


def orthonormal_rows(A: Tensor) -> Tensor:
    """Orthonormal rows that span what the rows of A (r, in) span; signs fixed by the triangular factor."""
    Q, R = torch.linalg.qr(A.double().T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
    rows: Tensor = (Q * sign).T.contiguous().to(A.dtype)
    return rows
