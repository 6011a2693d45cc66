"""FLoRA-NA with one coefficient per client and rank component, by alternating least squares: not in the paper.

    B_hat = B_0 + sum_u (B_u - B_0) diag(p_u)        A_hat = A_0 + sum_u diag(q_u) (A_u - A_0),      p_u, q_u in R^r

As wide as the scalars of `als` on the wire and in the clients' own coordinates, with r times the freedom. Write b_k and
a_k for the columns of B_u and the rows of A_u (less those of the base), k = (u, i). With q fixed and a_hat_i the rows
of A_hat, the error is quadratic in p with

    N_kl = (b_k . b_l)(a_hat_i(k) . a_hat_i(l))        g_k = b_k . (T - B_hat A_hat) a_hat_i(k)

over the U r unknowns, and the half-step is p <- p + W (W N W + ridge)^-1 W g, W = diag(sqrt |w|). In these coordinates
the ridge treats one client of weight 2 as two of weight 1; it is small, and a step can only lower the error.

It begins where the scalars end, so its fit is never above theirs, FedIT's, or that of a client alone. Cost: the inner
products once, (U r)^2 (out + in); then (U r)^3 / 3 and a few (U r)^2 r for each of at most 2 `sweeps` half-steps. With
100 clients of rank 16 that is 1600 unknowns and 1.4e9 multiply-adds a half-step; above `MOST` unknowns it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from florana.aggregate.flora_na import als
from florana.aggregate.flora_na.gram import Coefficients, target_square
from florana.aggregate.flora_na.matrix_free import Directions, Products
from florana.errors import InputError

RIDGE = 1e-9
"""Of the trace of W N W."""

MOST = 4096
"""The most unknowns, clients times rank: each of some five float64 matrices then takes 134 MB."""


def solve(modules: Sequence[Products], *, sweeps: int = 60, tolerance: float = 1e-4) -> Coefficients:
    """Coefficients p and q (U, r) for the modules that share them; errors are summed over the modules.

    Args:
        modules: one entry per module, of one rank; the same clients and weights in each.
        sweeps: the most rounds of (p, then q).
        tolerance: stop when a sweep lowers the squared error by less than this share of it.

    Returns:
        Where the base is zero, every component's p and q scaled to equal norms (the product has that freedom). The
        history begins at the error of the scalars.

    Raises:
        InputError: more than `MOST` unknowns, or modules of heterogeneous ranks.
    """
    sizes = {_size(module) for module in modules}
    if len({rank for _, rank in sizes}) > 1:
        raise InputError("coefficients per component cannot be shared by modules of heterogeneous ranks",
                         fix="fit every module by itself")  # fmt: skip
    (clients, rank), *_ = sizes
    if clients * rank > MOST:
        raise InputError(
            f"coefficients per component for {clients} clients of rank {rank} are {clients * rank} unknowns",
            why=f"every half-step solves a dense system of that size; {MOST} are the most that this takes on",
            fix="use scope = 'module' (one coefficient per client), or fewer clients at once",
        )
    largest = max(module.unit for module in modules)
    blocks = [replace(module.blocks(), unit=module.unit / largest if largest else 1.0) for module in modules]
    start = als.solve(blocks)
    sides = [_Side(_flat(block.G), _flat(block.H), rank, block.unit) for block in blocks]
    turned = [replace(side, free=side.fixed, fixed=side.free) for side in sides]
    target = sum(block.unit * float(target_square(block)) for block in blocks)
    floor = 4 * torch.finfo(torch.float64).eps * target
    weights = blocks[0].weights
    p, q = (
        torch.cat([torch.ones(1, dtype=x.dtype, device=x.device), x])[:, None].repeat(1, rank)
        for x in (start.p, start.q)
    )
    history = [start.history[-1]]
    for _ in range(sweeps):
        p_new, _ = _half_step(sides, weights, p, q)
        q_new, square = _half_step(turned, weights, q, p_new)
        if not target + square < history[-1] - floor:
            break  # rounding is all that is left: twins keep what they have
        p, q = p_new, q_new
        history.append(max(target + square, 0.0))
        if history[-2] - history[-1] <= tolerance * history[-2]:
            break
    p, q = p[1:], q[1:]
    if not any(block.has_base for block in blocks):
        p_norm, q_norm = p.norm(dim=0), q.norm(dim=0)
        ratio = torch.where((p_norm > 0) & (q_norm > 0), (q_norm / p_norm).sqrt(), 1.0)
        p, q = p * ratio, q / ratio
    return Coefficients(p, q, tuple(largest * square for square in history))


@dataclass(frozen=True, eq=False)
class _Side:
    """One module seen from the side that is free: the inner products of its components and of the fixed side's.

    free, fixed: ((U+1) r, (U+1) r), the base's components first.
    """

    free: Tensor
    fixed: Tensor
    rank: int
    unit: float


def _size(module: Products) -> tuple[int, int]:
    """Clients and rank."""
    if isinstance(module, Directions):
        return module.D.shape[0], module.D.shape[2]
    return len(module.weights), module.G.shape[2]


def _flat(G: Tensor) -> Tensor:
    """Blocks (n, n, r, r) as one matrix (n r, n r)."""
    size = G.shape[0] * G.shape[2]
    return G.permute(0, 2, 1, 3).reshape(size, size)


def _half_step(sides: Sequence[_Side], weights: Tensor, x: Tensor, other: Tensor) -> tuple[Tensor, float]:
    """The best x (U+1, r) for the other side fixed, 1 in its first row, and its error less ||T||^2."""
    rank = x.shape[1]
    component = torch.arange(x.numel(), device=x.device) % rank
    N = torch.zeros((x.numel(), x.numel()), dtype=x.dtype, device=x.device)
    b = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
    for side in sides:
        cross = torch.einsum("kui,ui->ki", side.fixed.view(-1, *x.shape), other)  # a_k . a_hat_i
        S = torch.einsum("ui,uij->ij", other, cross.view(*x.shape, rank))  # a_hat_i . a_hat_j
        N += side.unit * side.free * S[component][:, component]
        towards = weights[:, None, None] * (cross[:rank] + cross[rank:].view(-1, rank, rank))  # w_v A_v A_hat^T
        pulled = side.free[:, rank:] @ towards.flatten(0, 1) + side.free[:, :rank] @ towards.sum(dim=0)
        b += side.unit * pulled.gather(1, component[:, None])[:, 0]
    root = weights.abs().sqrt().repeat_interleave(rank)
    gradient = (b - N @ x.flatten())[rank:]
    system = N[rank:, rank:] * root[:, None] * root
    ridge = RIDGE * float(system.diagonal().sum())
    if ridge > 0:
        system.diagonal().add_(ridge)
        step = torch.cholesky_solve((root * gradient)[:, None], torch.linalg.cholesky(system))[:, 0] * root
        x = torch.cat([x[:1], x[1:] + step.view(-1, rank)])
    flat = x.flatten()
    return x, float(flat @ (N @ flat) - 2 * flat @ b)
