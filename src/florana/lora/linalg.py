"""Factored linear algebra: stacks, norms and the best rank-r pair of a sum of products. No (out x in) matrix.

Everything is computed in float64, whatever the dtype of the factors: the errors of interest are small
differences of large products, and the cores are at most R x R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from florana.lora.factors import LoraFactors


@dataclass(frozen=True, eq=False)
class Stack:
    """A matrix kept as a product `left @ right`, left (out, R), right (R, in), both float64, scaling inside."""

    left: Tensor
    right: Tensor


def stack(pairs: Sequence[LoraFactors], coefficients: Sequence[float]) -> Stack:
    """sum_u coefficient_u * scaling_u * B_u @ A_u as one product of rank R = sum r_u.

    Examples:
        >>> pair = LoraFactors(B=torch.ones(3, 1), A=torch.ones(1, 2), scaling=2.0)
        >>> whole = stack([pair, pair], [0.5, 0.25])
        >>> float((whole.left @ whole.right)[0, 0])
        1.5
    """
    left = [pair.B.double() * (c * pair.scaling) for pair, c in zip(pairs, coefficients, strict=True)]
    return Stack(torch.cat(left, dim=1), torch.cat([pair.A.double() for pair in pairs], dim=0))


def join(first: Stack, second: Stack, sign: float = 1.0) -> Stack:
    """`first + sign * second`, still factored; the ranks add up."""
    return Stack(torch.cat([first.left, sign * second.left], dim=1), torch.cat([first.right, second.right], dim=0))


def norm(product: Stack) -> float:
    """The Frobenius norm of `left @ right` from two thin QR factorisations: no cancellation, no dense matrix."""
    r_left = torch.linalg.qr(product.left, mode="r").R
    r_right = torch.linalg.qr(product.right.T, mode="r").R
    return float(torch.linalg.matrix_norm(r_left @ r_right.T))


def singular_values(product: Stack) -> Tensor:
    """The singular values of `left @ right`, descending; min(R, out, in) of them."""
    r_left = torch.linalg.qr(product.left, mode="r").R
    r_right = torch.linalg.qr(product.right.T, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_left @ r_right.T)
    return values


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Thin singular value decomposition of a Stack: `left @ diag(values) @ right`."""

    left: Tensor  # (out, k), orthonormal columns
    values: Tensor  # (k,), descending
    right: Tensor  # (k, in), orthonormal rows


def decompose(product: Stack) -> Decomposition:
    """Thin QR of both sides, SVD of the small core, signs fixed so that equal input gives equal output.

    With X Y the stack, X = Q_x R_x and Y^T = Q_y R_y, the core R_x R_y^T = L S V^T gives
    X Y = (Q_x L) S (Q_y V)^T. Cost O((out + in) R^2 + R^3). The largest entry of each left vector is made positive.
    """
    q_left, r_left = torch.linalg.qr(product.left)
    q_right, r_right = torch.linalg.qr(product.right.T)
    left, values, right = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return fixed_signs(Decomposition(q_left @ left, values, right @ q_right.T))


def fixed_signs(part: Decomposition) -> Decomposition:
    """The same decomposition with the largest entry of each left vector positive: equal input, equal output."""
    low, high = part.left.amin(dim=0), part.left.amax(dim=0)  # (k,)
    sign = torch.where(-low > high, -1.0, 1.0).to(part.left.dtype)
    if bool((-low == high).any()):  # of two entries of one size the first decides; rare, and dearer to find
        first = part.left.gather(0, part.left.abs().argmax(dim=0, keepdim=True))[0]
        sign = torch.where(first < 0, -1.0, 1.0).to(part.left.dtype)
    return Decomposition(part.left * sign, part.values, part.right * sign[:, None])


def balanced(part: Decomposition, scaling: float, dtype: torch.dtype) -> LoraFactors:
    """The pair B = L S^(1/2) / s^(1/2), A = S^(1/2) V^T / s^(1/2): equal norms, and s B A is the decomposition."""
    root = (part.values / scaling).sqrt()
    return LoraFactors(B=(part.left * root).to(dtype), A=(root[:, None] * part.right).to(dtype), scaling=scaling)


def kept(whole: Decomposition, rank: int) -> Decomposition:
    """The leading `rank` components, padded with zeros where there are fewer: the best rank-r part (Eckart-Young)."""
    have = min(rank, len(whole.values))
    left, values, right = whole.left[:, :have], whole.values[:have], whole.right[:have]
    if have < rank:
        left = torch.nn.functional.pad(left, (0, rank - have))
        values = torch.nn.functional.pad(values, (0, rank - have))
        right = torch.nn.functional.pad(right, (0, 0, 0, rank - have))
    return Decomposition(left, values, right)


def between(whole: Decomposition, begin: int, end: int) -> Decomposition:
    """The components from `begin` up to, not including, `end`."""
    return Decomposition(whole.left[:, begin:end], whole.values[begin:end], whole.right[begin:end])
