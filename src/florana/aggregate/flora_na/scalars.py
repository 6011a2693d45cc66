"""FLoRA-NA: aggregated factors as weighted sums of the clients' factors (arXiv 2509.26399).

    B_hat = B_0 + sum_u p_u (B_u - B_0)       A_hat = A_0 + sum_u q_u (A_u - A_0)
    (p, q) = argmin || B_hat A_hat - sum_u w_u B_u A_u ||_F^2          (the submission's Equation 6)

The paper leaves two things open, so all four readings are here:
  factors | updates   `base` None means B_0 = A_0 = 0 (whole factors); else the factors of the last broadcast.
  per module | whole  `fit` solves for one (p, q) per module, or one for the model (errors summed over modules).

Clients with unequal scalings enter as B_u s_u / s, so that the start p = q = w is FedIT in every case. The objective
never meets an (out x in) matrix: it is computed from the inner products G_ij = D_i^T D_j and H_ij = F_i F_j^T of the
directions D_0 = B_0, D_u = B_u - B_0 (F alike), or, for many clients, from the directions themselves (`cheaper`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from florana.aggregate import validate
from florana.aggregate.flora_na import als, starts
from florana.aggregate.flora_na.gram import Blocks, Coefficients, target_square
from florana.aggregate.flora_na.matrix_free import Directions, Products, mixed, rescaled
from florana.lora.factors import Adapter, Contribution, LoraFactors


@dataclass(frozen=True, eq=False)
class Mixture:
    """The mixed adapter and the coefficients by module name (the same pair for all where one serves the model)."""

    adapter: Adapter
    coefficients: Mapping[str, Coefficients]


Solver = Callable[[Sequence[Products]], Coefficients]
"""The modules that share one (p, q) -> the coefficients; never ends above p = q = w."""

Fit = Callable[[Mapping[str, Products], Solver], Mapping[str, Coefficients]]

Way = Callable[[Mapping[str, Directions]], Mapping[str, Products]]
"""In which form the modules go to the solver: `as_blocks`, `as_factors`, or `cheaper` of the two."""


def per_module(modules: Mapping[str, Products], solver: Solver) -> dict[str, Coefficients]:
    """One (p, q) for every module: each module's error is at most FedIT's."""
    return {name: solver([module]) for name, module in modules.items()}


def per_model(modules: Mapping[str, Products], solver: Solver) -> dict[str, Coefficients]:
    """One (p, q) for all modules: the error summed over modules is at most FedIT's."""
    shared = solver(list(modules.values()))
    return dict.fromkeys(modules, shared)


def per_model_relative(modules: Mapping[str, Products], solver: Solver) -> dict[str, Coefficients]:
    """One (p, q) for all modules, each module's squared error counted relative to its own target.

    The targets' norms need the blocks, so this fit always makes them.
    """
    blocks = {name: module.blocks() for name, module in modules.items()}
    squares = {name: float(target_square(block)) for name, block in blocks.items()}
    scaled = {
        name: replace(block, unit=1.0 / squares[name] if squares[name] > 0 else 0.0) for name, block in blocks.items()
    }
    return per_model(scaled, solver)


def as_blocks(modules: Mapping[str, Directions]) -> dict[str, Blocks]:
    """All inner products of all modules."""
    return {name: module.blocks() for name, module in modules.items()}


def as_factors(modules: Mapping[str, Directions]) -> Mapping[str, Directions]:
    """The directions as they are."""
    return modules


def cheaper(modules: Mapping[str, Directions]) -> Mapping[str, Products]:
    """`as_factors` where that costs less, with as many starts as the modules need (`starts`), else `as_blocks`."""
    one, dear = factors_cost(modules), blocks_cost(modules)
    if one >= dear or one * max(len(starts.of_directions([replace(m, unit=1.0)])) for m in modules.values()) >= dear:
        return as_blocks(modules)
    return as_factors(modules)


def blocks_cost(modules: Mapping[str, Directions]) -> float:
    """The multiply-adds in float64 of all blocks: (U r)^2 (out + in), summed over modules."""
    return sum(float(m.D.shape[0] * m.D.shape[2]) ** 2 * (m.D.shape[1] + m.F.shape[2]) for m in modules.values())


def factors_cost(modules: Mapping[str, Directions]) -> float:
    """A solve from the factors and one start in the same unit: READS per entry, and STEP_CALLS per module."""
    return sum(READS * (m.D.numel() + m.F.numel()) + STEP_CALLS for m in modules.values())


READS = 120.0
"""The multiply-adds of a float64 matrix product in the time of one solve from the factors, per entry of them: two or
three sweeps of six to ten conjugate-gradient iterations. One or two measured 70 to 80 at 4096 x 4096."""

STEP_CALLS = 2e7
"""The same for the hundred or so calls of such a solve on small tensors."""


def mix(
    parts: Sequence[Contribution],
    *,
    solver: Solver = als.solve,
    fit: Fit = per_module,
    base: Adapter | None = None,
    way: Way = cheaper,
) -> Mixture:
    """The adapter B_hat, A_hat with fitted coefficients; extra tensors are averaged with the weights.

    Args:
        parts: one contribution per client; equal ranks, any scalings, weights on any scale.
        solver: `als.solve`, `component.solve` (a coefficient per client and rank component) or `gradient.solve`.
        fit: `per_module`, `per_model` or `per_model_relative`.
        base: the adapter all clients started from, to mix updates; None to mix whole factors.
        way: `cheaper`, `as_blocks` or `as_factors`; the same stationary point by different arithmetic.

    Raises:
        InputError: the contributions (or the base) do not fit together; client, module and shapes are named.

    Examples:
        >>> x = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 1.0)})
        >>> y = Adapter({"q": LoraFactors(3 * torch.ones(3, 1), 3 * torch.ones(1, 2), 1.0)})
        >>> both = [Contribution("x", x, 1), Contribution("y", y, 1)]
        >>> pair = mix(both).adapter.modules["q"]
        >>> round(float((pair.B @ pair.A)[0, 0]), 4)  # (1 + 9) / 2; averaging the factors would give 4
        5.0
    """
    device = next(iter(parts[0].adapter.modules.values())).A.device if parts else None
    weights = torch.tensor(validate.shares(parts), dtype=torch.float64, device=device)
    directions, modules = {}, {}
    columns = validate.matched(parts)
    for name, pairs in columns.items():
        validate.same_rank(parts, name, pairs, "flora-na")
        if base is not None:
            start = Contribution("the last broadcast", base, 1.0)
            validate.same_rank([*parts, start], name, [*pairs, base.modules[name]], "flora-na")
        directions[name] = directions_of(pairs, None if base is None else base.modules[name], weights)
        # A NaN or an infinity stays one in a weighted sum, so FedIT's factors speak for all inputs.
        if not (validate.is_finite(directions[name].B) and validate.is_finite(directions[name].A)):
            validate.require_finite_factors(parts, name, pairs)
    coefficients = fit(way({name: rescaled(module) for name, module in directions.items()}), solver)
    for name, pairs in columns.items():
        found, module, dtype = coefficients[name], directions[name], pairs[0].A.dtype
        modules[name] = LoraFactors(
            B=module.left(found.p).to(dtype), A=module.right(found.q).to(dtype), scaling=validate.output_scaling(pairs)
        )
    return Mixture(Adapter(modules, validate.average_extra(parts)), coefficients)


def directions_of(pairs: Sequence[LoraFactors], base: LoraFactors | None, weights: Tensor) -> Directions:
    """The stacked directions of one module, in at least float32, scalings inside; `base` None mixes whole factors."""
    scaling, wide = validate.output_scaling(pairs), torch.promote_types(pairs[0].A.dtype, torch.float32)
    D, F = torch.stack([pair.B for pair in pairs]).to(wide), torch.stack([pair.A for pair in pairs]).to(wide)
    for D_u, pair in zip(D, pairs, strict=True):
        if pair.scaling != scaling:
            D_u *= pair.scaling / scaling
    if base is None:
        D_0, F_0 = torch.zeros_like(D[0]), torch.zeros_like(F[0])
    else:
        ([D_0], [F_0]) = validate.unscaled([base], scaling)
        D, F = D - D_0, F - F_0
    return Directions(D, F, D_0, F_0, weights, D_0 + mixed(D, weights), F_0 + mixed(F, weights))
