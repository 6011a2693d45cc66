"""Alternating least squares for FLoRA-NA's coefficients: each half-step solves a U x U system.

For q fixed the error is x^T M x - 2 x^T b + const in x = (1, p); the half-step in difference form is

    p <- p + N^+ (b - M x)[1:],     N = M[1:, 1:],     N^+ the pseudo-inverse

and the same for q. No learning rate; the error never increases; the pseudo-inverse leaves directions without
curvature alone, so identical clients keep p = q = w and one client of weight 2 is two of weight 1.

Two ways to the same step: from the inner products of all clients (`blocks`, dear to make and then nearly free), or
from the factors by conjugate gradients (`direct`, a few reads of all factors per step); `mix.cheaper` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.aggregate import direct
from florana.aggregate.blocks import Blocks, Coefficients, quadratic, target_square
from florana.aggregate.direct import Directions, Products

RELATIVE_CUT = 1e-10
"""Eigenvalues of N below this share of the largest count as zero."""

HALF_STEP = 0.1
"""A half-step on the factors ends when an iteration adds less than this share to its fall; the next sweep sees the
rest."""

NEXT_FALL = 0.1
"""The second sweep's fall as a share of the first's, before it is known. Measured: 0.02 to 0.07."""


def solve(modules: Sequence[Products], *, sweeps: int = 50, tolerance: float | None = None) -> Coefficients:
    """Coefficients for the modules that share them; errors are summed over the modules.

    Args:
        modules: one entry per module, all of one kind; the same clients and weights in each.
        sweeps: the most rounds of (p, then q).
        tolerance: with Blocks, stop when a sweep lowers the squared error by less than this share of it (1e-6 if
            None). With Directions, where a sweep costs as much as all blocks of a few clients, stop when what further
            sweeps are expected to bring is less than this share of it (1e-2 if None, 0.5 % of the error). Both figures
            are estimates there: the squared error from random probes (||T||^2 itself would cost as much as the
            blocks), the further falls from the last two as a geometric series.

    Returns:
        p and q scaled to equal norms where the base is zero (the product has that freedom), as found otherwise. With
        Directions the history starts at 0 and counts down: it is the error less the error of the start.
    """
    blocks = [module for module in modules if isinstance(module, Blocks)]
    factors = [module for module in modules if isinstance(module, Directions)]
    if blocks and factors:
        raise ValueError("modules that share coefficients must be of one kind")
    if blocks:
        p, q, history = _by_blocks(blocks, sweeps, 1e-6 if tolerance is None else tolerance)
    else:
        p, q, history = _by_factors(factors, sweeps, 1e-2 if tolerance is None else tolerance)
    if not any(module.has_base for module in modules):
        p_norm, q_norm = float(p.norm()), float(q.norm())
        if p_norm > 0 and q_norm > 0:
            ratio = (q_norm / p_norm) ** 0.5
            p, q = p * ratio, q / ratio
    return Coefficients(p, q, history)


def _by_blocks(blocks: Sequence[Blocks], sweeps: int, tolerance: float) -> tuple[Tensor, Tensor, tuple[float, ...]]:
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
    return p[1:], q[1:], tuple(history)


def _by_factors(
    modules: Sequence[Directions], sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    p = q = modules[0].weights
    pairs = [(module.B, module.A) for module in modules]
    rounding = 32 * torch.finfo(modules[0].D.dtype).eps
    precision = min(HALF_STEP, 10 * tolerance)
    start = sum(direct.square_estimate(module, *pair) for module, pair in zip(modules, pairs, strict=True))
    history = [0.0]
    for _ in range(sweeps):
        sides = [direct.in_p(module, *pair) for module, pair in zip(modules, pairs, strict=True)]
        change, moves, fall_p = direct.step(sides, precision, rounding)
        p, pairs = p + change, [(B + move, A) for (B, A), move in zip(pairs, moves, strict=True)]
        sides = [direct.in_q(module, *pair) for module, pair in zip(modules, pairs, strict=True)]
        change, moves, fall_q = direct.step(sides, precision, rounding)
        q, pairs = q + change, [(B, A + move) for (B, A), move in zip(pairs, moves, strict=True)]
        history.append(history[-1] - fall_p - fall_q)
        floor = rounding**2 * sum(side.size for side in sides)
        if fall_p + fall_q <= floor or _expected(history) <= tolerance * (start + history[-1]):
            break
    return p, q, tuple(history)


def _expected(history: Sequence[float]) -> float:
    """How far the error would still fall, were the falls to go on as a geometric series."""
    last = history[-2] - history[-1]
    before = history[-3] - history[-2] if len(history) > 2 else last / NEXT_FALL
    return last * last / (before - last) if before > last else float("inf")


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
