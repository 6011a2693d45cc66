"""What a round moved the global product by, and what a server optimizer makes of it. All factored, never dense.

    W_t = s B A (+ the frozen part)                    the product that was broadcast, per module
    d_t = sum_u w_u s_u B_u A_u - W_t                  the round's displacement: a pseudo-gradient, negated
    v_t = beta v_{t-1} + d_t                           its velocity (momentum on products)
    eta_t = max(1, sum_u w_u ||d_u||^2 / (2 ||d_t||^2))     FedExP's step (Jhunjhunwala et al., arXiv 2301.09604)

d_u is one client's own displacement. Norms run over all modules and the tensors trained whole. A velocity is kept in a
bounded number of singular components; what that leaves out is reported, not hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from florana.aggregate import validate
from florana.aggregate.best_rank.project import targets
from florana.aggregate.best_rank.truncate import NEGLIGIBLE
from florana.aggregate.cores import folded
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution, LoraFactors

Stacks = Mapping[str, linalg.Stack]
"""Module name -> a factored product."""


def products(adapter: Adapter, frozen: Adapter | None) -> dict[str, linalg.Stack]:
    """scaling * B A of every module, plus its frozen part where there is one.

    Examples:
        >>> pair = LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 2.0)
        >>> whole = products(Adapter({"q": pair}), Adapter({"q": pair}))["q"]
        >>> float((whole.left @ whole.right)[0, 0])
        4.0
    """
    parts = {name: linalg.stack([pair], [1.0]) for name, pair in folded(adapter).modules.items()}
    for name, pair in frozen.modules.items() if frozen is not None else ():
        parts[name] = linalg.join(parts[name], linalg.stack([pair], [1.0]))
    return parts


def displacement(after: Stacks, before: Stacks) -> dict[str, linalg.Stack]:
    """after - before, module by module."""
    return {name: linalg.join(whole, before[name], sign=-1.0) for name, whole in after.items()}


def average(parts: Sequence[Contribution]) -> dict[str, linalg.Stack]:
    """The true weighted mean of the clients' products, what they carried frozen included."""
    plain = [replace(part, adapter=folded(part.adapter)) for part in parts]
    return {name: whole for name, (whole, _, _) in targets(plain).items()}


def combined(first: Stacks, a: float, second: Stacks, b: float) -> dict[str, linalg.Stack]:
    """a * first + b * second; a module that `second` lacks counts as zero there."""
    scaled = {name: linalg.Stack(a * whole.left, whole.right) for name, whole in first.items()}
    return {
        name: linalg.join(whole, second[name], sign=b) if name in second else whole for name, whole in scaled.items()
    }


@dataclass(frozen=True, eq=False)
class Shortened:
    """Products in few singular components, scaling 1; None where all are zero. `missed` is what they leave out,
    || rest ||_F / || whole ||_F over all modules."""

    adapter: Adapter | None
    missed: float


def shortened(stacks: Stacks, rank: Mapping[str, int] | None, dtype: torch.dtype) -> Shortened:
    """The leading components of each product, as balanced factors of scaling 1.

    Args:
        stacks: module -> product.
        rank: module -> the most components; None keeps all that float32 resolves.
        dtype: of the factors that come out.
    """
    modules: dict[str, LoraFactors] = {}
    rest, total = [], []
    for name, product in stacks.items():
        whole = linalg.decompose(product)
        squares = whole.values.square()
        significant = int((whole.values > NEGLIGIBLE * whole.values[0]).sum())
        end = significant if rank is None else min(rank[name], significant)
        rest.append(float(squares[end:].sum()))
        total.append(float(squares.sum()))
        if end:
            modules[name] = linalg.balanced(linalg.between(whole, 0, end), 1.0, dtype)
    missed = math.sqrt(math.fsum(rest) / math.fsum(total)) if any(total) else 0.0
    return Shortened(Adapter(modules) if modules else None, missed)


def extrapolation(parts: Sequence[Contribution], adapter: Adapter, frozen: Adapter | None) -> float:
    """FedExP's step length eta_t, at least 1: how much farther than the mean the clients' agreement lets one go.

    Args:
        parts: one contribution per client, weights on any scale.
        adapter: what was broadcast.
        frozen: the frozen part of the broadcast; None where there is none.

    Examples:
        >>> def client(name, value):
        ...     return Contribution(name, Adapter({"q": LoraFactors(torch.eye(4)[:, value:value + 1],
        ...                                                         torch.eye(4)[value:value + 1], 1.0)}), 1.0)
        >>> start = Adapter({"q": LoraFactors(torch.zeros(4, 1), torch.ones(1, 4), 1.0)})
        >>> round(extrapolation([client(str(k), k) for k in range(4)], start, None), 4)  # orthogonal: 1 / (2 / 4)
        2.0
    """
    before = products(adapter, frozen)
    own = []
    for part, weight in zip(parts, validate.shares(parts), strict=True):
        moved = displacement(average([replace(part, weight=1.0)]), before)
        own.append(weight * (_square(moved) + _extra_square(part.adapter, adapter)))
    mean = _square(displacement(average(parts), before))
    mean += _extra_square(Adapter(adapter.modules, validate.average_extra(parts)), adapter)
    return max(1.0, math.fsum(own) / (2.0 * mean)) if mean > 0 else 1.0


def _square(stacks: Stacks) -> float:
    return math.fsum(linalg.norm(whole) ** 2 for whole in stacks.values())


def _extra_square(after: Adapter, before: Adapter) -> float:
    """The squared change of the tensors trained whole that both have (personal heads are at one of them alone)."""
    shared = after.extra.keys() & before.extra.keys()
    return math.fsum(float((after.extra[n].double() - before.extra[n].double()).square().sum()) for n in sorted(shared))
