"""Alternating least squares for FLoRA-NA's coefficients: each half-step solves a U x U system.

For q fixed the error is x^T M x - 2 x^T b + const in x = (1, p); the half-step in difference form is

    p <- p + N^+ (b - M x)[1:],     N = M[1:, 1:],     N^+ the pseudo-inverse

and the same for q. No learning rate; the error never increases; the pseudo-inverse leaves directions without
curvature alone, so identical clients keep p = q = w and one client of weight 2 is two of weight 1. The error is not
convex in (p, q): `starts` says from where the steps begin, and the lowest end counts.

Two ways to the same step: from the inner products of all clients (`blocks`, dear to make and then nearly free), or
from the factors by conjugate gradients (`direct`, a few reads of all factors per step); `mix.cheaper` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from florana.aggregate.flora_na import matrix_free, starts
from florana.aggregate.flora_na.gram import Blocks, Coefficients, quadratic, target_square
from florana.aggregate.flora_na.matrix_free import Directions, Products

RELATIVE_CUT = 1e-10
"""Eigenvalues of N below this share of the largest count as zero."""

LOWER = 1e-6
"""An end counts as lower than FedIT's where its squared error is lower by more than this share of it."""

HALF_STEP = 0.03
"""A half-step on the factors ends when an iteration adds less than this share to its fall; the next sweep sees the
rest."""


def solve(modules: Sequence[Products], *, sweeps: int = 50, tolerance: float | None = None) -> Coefficients:
    """Coefficients for the modules that share them; errors are summed over the modules.

    Args:
        modules: one entry per module, all of one kind; the same clients and weights in each.
        sweeps: the most rounds of (p, then q) from each start.
        tolerance: with Blocks, stop when a sweep lowers the squared error by less than this share of it (1e-6 if None).
            With Directions, where a sweep costs as much as all blocks of a few clients, stop when what further sweeps
            are expected to bring is less than this share of it (3e-3 if None; what is held to is 0.5 % of the error, a
            share of 1e-2). Both figures are estimates there: the squared error from random probes (||T||^2 itself would
            cost as much as the blocks), the further falls from the last two as a geometric series.

    Returns:
        p and q scaled to equal norms where the base is zero (the product has that freedom), as found otherwise, and the
        squared errors from the start that they were found from. With Directions the history starts at 0 and counts
        down: it is the error less the error of that start.
    """
    blocks = [module for module in modules if isinstance(module, Blocks)]
    factors = [module for module in modules if isinstance(module, Directions)]
    if blocks and factors:
        raise ValueError("modules that share coefficients must be of one kind")
    largest = max(module.unit for module in modules)
    if largest > 0:  # squares of units may be out of range where units are not
        blocks = [replace(block, unit=block.unit / largest) for block in blocks]
        factors = [replace(module, unit=module.unit / largest) for module in factors]
    if blocks:
        p, q, history = _by_blocks(blocks, sweeps, 1e-6 if tolerance is None else tolerance)
    else:
        p, q, history = _by_factors(factors, sweeps, 3e-3 if tolerance is None else tolerance)
    if not any(module.has_base for module in modules):
        p_norm, q_norm = float(p.norm()), float(q.norm())
        if p_norm > 0 and q_norm > 0:
            ratio = (q_norm / p_norm) ** 0.5
            p, q = p * ratio, q / ratio
    return Coefficients(p, q, tuple(largest * square for square in history))


def _by_blocks(blocks: Sequence[Blocks], sweeps: int, tolerance: float) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """All starts at once, one in each row."""
    target = sum(
        (block.unit * target_square(block) for block in blocks),
        torch.zeros((), dtype=torch.float64, device=blocks[0].weights.device),
    )
    floor = 4 * torch.finfo(torch.float64).eps * float(target)  # below this an error is rounding
    fedit = _with_base(blocks[0].weights[None])
    p = q = _with_base(starts.of_blocks(blocks, float(error_at(blocks, fedit, fedit, target))))
    error = error_at(blocks, p, q, target)
    history = [error]
    for _ in range(sweeps):
        p = _half_step([(b.G, b.H, b.unit) for b in blocks], blocks[0].weights, p, q)
        q = _half_step([(b.H, b.G, b.unit) for b in blocks], blocks[0].weights, q, p)
        now = torch.minimum(error_at(blocks, p, q, target), error)
        history.append(now)
        if bool((error - now <= tolerance * error + floor).all()):
            break
        error = now
    best = _lowest(history[-1].tolist(), LOWER, floor)
    return p[best, 1:], q[best, 1:], tuple(float(errors[best]) for errors in history)


def _lowest(errors: Sequence[float], margin: float, floor: float) -> int:
    """The row of the lowest error; the first one, FedIT's, unless another is clearly lower."""
    best = min(range(len(errors)), key=lambda row: errors[row])
    return best if errors[best] < errors[0] * (1 - margin) - floor else 0


def _by_factors(
    modules: Sequence[Directions], sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """One start after the other; their ends are compared by || B A ||^2 - 2 <T, B A>, the error less ||T||^2."""
    first, *alone = starts.of_directions(modules)
    begun = [(first, first), *((_scale(modules, start) * start, start) for start in alone)]
    found = [_descent(modules, p, q, sweeps, tolerance) for p, q in begun]
    if not alone:
        return found[0]
    ends = []
    for p, q, _ in found:
        figures = [matrix_free.against_target(module, module.left(p), module.right(q)) for module in modules]
        ends.append(sum(own - 2 * cross for cross, own in figures))
    return found[_lowest(ends, 0.0, 32 * torch.finfo(modules[0].D.dtype).eps * abs(ends[0]))]


def _scale(modules: Sequence[Directions], start: Tensor) -> float:
    """What p is best multiplied by where p = q = start; 1 where a base makes that another model."""
    if any(module.has_base for module in modules):
        return 1.0
    figures = [matrix_free.against_target(module, module.left(start), module.right(start)) for module in modules]
    cross, own = (sum(column) for column in zip(*figures, strict=True))
    return cross / own if own > 0 else 1.0


def _descent(
    modules: Sequence[Directions], p: Tensor, q: Tensor, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    pairs = [(module.left(p), module.right(q)) for module in modules]
    rounding = 32 * torch.finfo(modules[0].D.dtype).eps
    precision = min(HALF_STEP, 10 * tolerance)
    square = sum(matrix_free.square_estimate(module, *pair) for module, pair in zip(modules, pairs, strict=True))
    history = [0.0]
    for _ in range(sweeps):
        sides = [matrix_free.in_p(module, *pair) for module, pair in zip(modules, pairs, strict=True)]
        change, moves, fall_p = matrix_free.step(sides, precision, rounding)
        p, pairs = p + change, [(B + move, A) for (B, A), move in zip(pairs, moves, strict=True)]
        sides = [matrix_free.in_q(module, *pair) for module, pair in zip(modules, pairs, strict=True)]
        change, moves, fall_q = matrix_free.step(sides, precision, rounding)
        q, pairs = q + change, [(B, A + move) for (B, A), move in zip(pairs, moves, strict=True)]
        history.append(history[-1] - fall_p - fall_q)
        floor = rounding**2 * sum(side.size for side in sides)
        if fall_p + fall_q <= floor or _expected(history) <= tolerance * (square + history[-1]):
            break
    return p, q, tuple(history)


def _expected(history: Sequence[float]) -> float:
    """How far the error would still fall, were the falls to go on as a geometric series: two of them must be known."""
    if len(history) < 3:
        return float("inf")
    before, last = history[-3] - history[-2], history[-2] - history[-1]
    return last * last / (before - last) if before > last else float("inf")


def error_at(blocks: Sequence[Blocks], p: Tensor, q: Tensor, target: Tensor) -> Tensor:
    """The summed squared errors (S,) of full coefficient vectors (S, U+1), 1 first."""
    total = target.expand(len(p)).clone()
    for block in blocks:
        M, b = quadratic(block.G, block.H, block.weights, q)
        total += block.unit * (torch.einsum("si,sij,sj->s", p, M, p) - 2 * (p * b).sum(dim=1))
    return total.clamp_min(0.0)


def _with_base(rows: Tensor) -> Tensor:
    """(S, U) -> (S, U+1): the base's coefficient, 1, before each row."""
    return torch.cat([torch.ones((len(rows), 1), dtype=rows.dtype, device=rows.device), rows], dim=1)


def _half_step(sides: Sequence[tuple[Tensor, Tensor, float]], weights: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """The best x (S, U+1) for the other side fixed, row by row."""
    M = torch.zeros((*x.shape, x.shape[1]), dtype=x.dtype, device=x.device)
    b = torch.zeros_like(x)
    for free, fixed, unit in sides:
        M_l, b_l = quadratic(free, fixed, weights, other)
        M, b = M + unit * M_l, b + unit * b_l
    residual = (b - (M @ x[:, :, None])[:, :, 0])[:, 1:, None]
    step = torch.linalg.pinv(M[:, 1:, 1:], rtol=RELATIVE_CUT, hermitian=True) @ residual
    return torch.cat([x[:, :1], x[:, 1:] + step[:, :, 0]], dim=1)
