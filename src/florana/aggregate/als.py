"""Alternating least squares for FLoRA-NA's coefficients: each half-step solves a U x U system exactly.

For q fixed the error is x^T M x - 2 x^T b + const in x = (1, p); the half-step in difference form is

    p <- p + N^+ (b - M x)[1:],     N = M[1:, 1:],     N^+ the pseudo-inverse

and the same for q. No learning rate; the error never increases; the pseudo-inverse leaves directions without
curvature alone, so identical clients keep p = q = w and one client of weight 2 is two of weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.aggregate.blocks import Blocks, Coefficients, quadratic, target_square

RELATIVE_CUT = 1e-10
"""Eigenvalues of N below this share of the largest count as zero."""


def solve(blocks: Sequence[Blocks], *, sweeps: int = 50, tolerance: float = 1e-6) -> Coefficients:
    """Coefficients for the modules that share them; errors are summed over the modules.

    Args:
        blocks: one entry per module; the same clients and weights in each.
        sweeps: the most rounds of (p, then q).
        tolerance: stop when a sweep lowers the error by less than this share of it.

    Returns:
        p and q scaled to equal norms where the base is zero (the product has that freedom), as found otherwise.
    """
    weights = blocks[0].weights
    one = torch.ones(1, dtype=weights.dtype)
    p, q = torch.cat([one, weights]), torch.cat([one, weights])
    target = sum((block.unit * target_square(block) for block in blocks), torch.zeros((), dtype=weights.dtype))
    floor = 4 * torch.finfo(torch.float64).eps * float(target)  # below this an error is rounding
    error = float("inf")
    history: list[float] = []
    for sweep in range(sweeps):
        p, start = _half_step([(b.G, b.H, b.unit) for b in blocks], weights, p, q, target)
        if sweep == 0:
            history.append(start)
            error = start
        q, _ = _half_step([(b.H, b.G, b.unit) for b in blocks], weights, q, p, target)
        now = error_at(blocks, p, q, target)
        history.append(min(now, error))
        if error - now <= tolerance * error + floor:
            break
        error = now
    if all(not bool(b.G[0, 0].any()) and not bool(b.H[0, 0].any()) for b in blocks):
        p_norm, q_norm = float(p[1:].norm()), float(q[1:].norm())
        if p_norm > 0 and q_norm > 0:
            ratio = (q_norm / p_norm) ** 0.5
            p, q = p * ratio, q / ratio
    return Coefficients(p[1:], q[1:], tuple(history))


def error_at(blocks: Sequence[Blocks], p: Tensor, q: Tensor, target: Tensor) -> float:
    """The summed squared error of full coefficient vectors (1 first)."""
    total = float(target)
    for block in blocks:
        M, b = quadratic(block.G, block.H, block.weights, q)
        total += block.unit * float(p @ M @ p - 2 * p @ b)
    return max(total, 0.0)


def _half_step(
    sides: Sequence[tuple[Tensor, Tensor, float]], weights: Tensor, x: Tensor, other: Tensor, target: Tensor
) -> tuple[Tensor, float]:
    """The best x for the other side fixed, and the error before the step."""
    size = len(x)
    M, b = torch.zeros((size, size), dtype=x.dtype), torch.zeros(size, dtype=x.dtype)
    for free, fixed, unit in sides:
        M_l, b_l = quadratic(free, fixed, weights, other)
        M, b = M + unit * M_l, b + unit * b_l
    before = max(float(target + x @ M @ x - 2 * x @ b), 0.0)
    step = torch.linalg.pinv(M[1:, 1:], rtol=RELATIVE_CUT, hermitian=True) @ (b - M @ x)[1:]
    return torch.cat([x[:1], x[1:] + step]), before
