"""FLoRA-NA: aggregated factors as weighted sums of the clients' factors (arXiv 2509.26399).

    B_hat = B_0 + sum_u p_u (B_u - B_0)       A_hat = A_0 + sum_u q_u (A_u - A_0)
    (p, q) = argmin || B_hat A_hat - sum_u w_u B_u A_u ||_F^2          (the submission's Equation 6)

The paper leaves two things open, so all four readings are here:
  factors | updates   `base` None means B_0 = A_0 = 0 (whole factors); else the pair of the last broadcast.
  per module | whole  `fit` solves for one (p, q) per module, or one for the model (errors summed over modules).

Clients with unequal scalings enter as B_u s_u / s, so that the start p = q = w is FedIT in every case. Only the
inner products of the factors are needed, G_ij = D_i^T D_j and H_ij = F_i F_j^T of the directions D_0 = B_0,
D_u = B_u - B_0 (F alike): the objective never meets an (out x in) matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from florana.aggregate import als, inputs
from florana.aggregate.blocks import Blocks, Coefficients, blocks_of, target_square
from florana.factors import Adapter, Contribution, LoraFactors


@dataclass(frozen=True, eq=False)
class Mixture:
    """The mixed adapter and the coefficients by module name (the same pair for all where one serves the model)."""

    adapter: Adapter
    coefficients: Mapping[str, Coefficients]


Solver = Callable[[Sequence[Blocks]], Coefficients]
"""Blocks of the modules that share one (p, q) -> the coefficients; starts at p = q = w and never ends above it."""

Fit = Callable[[Mapping[str, Blocks], Solver], Mapping[str, Coefficients]]


def per_module(blocks: Mapping[str, Blocks], solver: Solver) -> dict[str, Coefficients]:
    """One (p, q) for every module: each module's error is at most FedIT's."""
    return {name: solver([block]) for name, block in blocks.items()}


def per_model(blocks: Mapping[str, Blocks], solver: Solver) -> dict[str, Coefficients]:
    """One (p, q) for all modules: the error summed over modules is at most FedIT's."""
    shared = solver(list(blocks.values()))
    return dict.fromkeys(blocks, shared)


def per_model_relative(blocks: Mapping[str, Blocks], solver: Solver) -> dict[str, Coefficients]:
    """One (p, q) for all modules, each module's squared error counted relative to its own target."""
    squares = {name: float(target_square(block)) for name, block in blocks.items()}
    scaled = {
        name: replace(block, unit=1.0 / squares[name] if squares[name] > 0 else 0.0) for name, block in blocks.items()
    }
    return per_model(scaled, solver)


def mix(
    parts: Sequence[Contribution], *, solver: Solver = als.solve, fit: Fit = per_module, base: Adapter | None = None
) -> Mixture:
    """The adapter B_hat, A_hat with fitted coefficients; extra tensors are averaged with the weights.

    Args:
        parts: one contribution per client; equal ranks, any scalings, weights on any scale.
        solver: `als.solve` or `gradient.solve`.
        fit: `per_module`, `per_model` or `per_model_relative`.
        base: the adapter all clients started from, to mix updates; None to mix whole factors.

    Raises:
        InputError: the contributions (or the base) do not fit together; client, module and shapes are named.

    >>> x = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 1.0)})
    >>> y = Adapter({"q": LoraFactors(3 * torch.ones(3, 1), 3 * torch.ones(1, 2), 1.0)})
    >>> both = [Contribution("x", x, 1), Contribution("y", y, 1)]
    >>> pair = mix(both).adapter.modules["q"]
    >>> round(float((pair.B @ pair.A)[0, 0]), 4)  # (1 + 9) / 2; averaging the factors would give 4
    5.0
    """
    weights = inputs.shares(parts)
    directions: dict[str, tuple[list[Tensor], list[Tensor], float, torch.dtype]] = {}
    for name, pairs in inputs.columns(parts).items():
        inputs.same_rank(parts, name, pairs, "flora-na")
        scaling = inputs.output_scaling(pairs)
        Bs, As = inputs.unscaled(pairs, scaling)
        if base is None:
            B_0, A_0 = torch.zeros_like(Bs[0]), torch.zeros_like(As[0])
        else:
            start = Contribution("the last broadcast", base, 1.0)
            inputs.same_rank([*parts, start], name, [*pairs, base.modules[name]], "flora-na")
            ([B_0], [A_0]) = inputs.unscaled([base.modules[name]], scaling)
        Ds = [B_0, *(B_u - B_0 for B_u in Bs)]
        Fs = [A_0, *(A_u - A_0 for A_u in As)]
        directions[name] = (Ds, Fs, scaling, pairs[0].A.dtype)

    shares = torch.tensor(weights, dtype=torch.float64)
    coefficients = fit({name: blocks_of(Ds, Fs, shares) for name, (Ds, Fs, _, _) in directions.items()}, solver)
    modules = {}
    for name, (Ds, Fs, scaling, dtype) in directions.items():
        found = coefficients[name]
        modules[name] = LoraFactors(
            B=_combine(Ds, found.p).to(dtype), A=_combine(Fs, found.q).to(dtype), scaling=scaling
        )
    return Mixture(Adapter(modules, inputs.average_extra(parts)), coefficients)


def _combine(directions: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    total = directions[0].clone()
    for direction, coefficient in zip(directions[1:], coefficients.tolist(), strict=True):
        total += coefficient * direction
    return total
