"""FLoRA-NA's objective in inner products: everything a solver needs to know of a module, and its error as a quadratic.

With directions D_0 = B_0, D_u = B_u - B_0 and F_0 = A_0, F_u = A_u - A_0, the mixed factors are B_hat = sum_i x_i D_i,
A_hat = sum_i y_i F_i, x = (1, p), y = (1, q); the target is sum_u w_u (D_0 + D_u)(F_0 + F_u).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """The inner products of one module's directions, float64; index 0 is the base, 1..U the clients.

    Args:
        G: (U+1, U+1, r, r), G[i, j] = D_i^T D_j.
        H: (U+1, U+1, r, r), H[i, j] = F_i F_j^T.
        weights: (U,), summing to 1.
        unit: what one unit of squared error of this module counts in a sum over modules.
    """

    G: Tensor
    H: Tensor
    weights: Tensor
    unit: float = 1.0

    @property
    def has_base(self) -> bool:
        """Whether updates are mixed: a pair of zeros is no base."""
        return bool(self.G[0, 0].any()) or bool(self.H[0, 0].any())

    def blocks(self) -> Blocks:
        """Itself."""
        return self


@dataclass(frozen=True, eq=False)
class Coefficients:
    """A solver's answer: p and q, (U,) or (U, r), and the summed squared error at the start and after every step kept.

    Where the solver cannot know the error, only its falls, the history is the error less that of the start.

    Args:
        p: coefficients of B, (U,) or (U, r).
        q: coefficients of A, (U,) or (U, r).
        history: the summed squared error at the start and after every step kept.
    """

    p: Tensor
    q: Tensor
    history: tuple[float, ...]


def whole_blocks(G: Tensor) -> Tensor:
    """The inner products of whole factors from those of directions: (U, U, r, r), B_u^T B_v with B_u = D_0 + D_u."""
    return G[0, 0] + G[:1, 1:] + G[1:, :1] + G[1:, 1:]


def target_square(block: Blocks) -> Tensor:
    """|| sum_u w_u B_u A_u ||^2 from the blocks, a scalar."""
    return torch.einsum("u,v,uvab,uvab->", block.weights, block.weights, whole_blocks(block.G), whole_blocks(block.H))


def quadratic(G: Tensor, H: Tensor, weights: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The error as a quadratic in one side's coefficients x, the other side's fixed: x^T M x - 2 x^T b + const.

    Args:
        G: blocks of the side that is free, (U+1, U+1, r, r).
        H: blocks of the side that is fixed, (U+1, U+1, r, r).
        weights: (U,).
        other: (..., U+1), the fixed side's coefficients, 1 for the base; one quadratic for each row.

    Returns:
        M (..., U+1, U+1) with M_ij = <G_ij, S>, S = A_hat A_hat^T, and b (..., U+1) with
        b_i = sum_v w_v trace(D_i^T B_v A_v A_hat^T). For the other side swap G and H.
    """
    half = torch.einsum("...j,ijab->...iab", other, H)  # F_i A_hat^T, (..., U+1, r, r)
    S = torch.einsum("...i,...iab->...ab", other, half)
    M = torch.einsum("ijab,...ab->...ij", G, S)
    towards = weights[:, None, None] * (half[..., :1, :, :] + half[..., 1:, :, :])  # w_v A_v A_hat^T
    b = torch.einsum("ivab,...vba->...i", G[:, :1] + G[:, 1:], towards)
    return M, b


def blocks_of(Ds: Sequence[Tensor], Fs: Sequence[Tensor], weights: Tensor) -> Blocks:
    """The inner products of directions Ds (out, r) and Fs (r, in), the base first; `weights` (U,)."""
    count, rank = len(Ds), Ds[0].shape[1]
    D = torch.cat([D_i.double() for D_i in Ds], dim=1)  # (out, (U+1) r)
    F = torch.cat([F_i.double() for F_i in Fs], dim=0)  # ((U+1) r, in)
    shape = (count, rank, count, rank)
    G = (D.T @ D).reshape(shape).permute(0, 2, 1, 3)
    H = (F @ F.T).reshape(shape).permute(0, 2, 1, 3)
    return Blocks(G.contiguous(), H.contiguous(), weights)
