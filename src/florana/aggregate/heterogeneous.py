"""Unequal ranks by padding with zeros, and HetLoRA's weighted mean of padded factors.

    pad(B_u) = [B_u, 0] (out, r)        pad(A_u) = [A_u; 0] (r, in)        same product, rank r at most
    HetLoRA (Cho et al., arXiv 2401.06432):  omega_u ~ w_u || s_u B_u A_u ||_F over all modules, summing to 1
        B = sum_u omega_u pad(B_u),   A = sum_u omega_u pad(A_u)

The paper's weights are the norms alone; with equal w_u these are the same. Which column of one client meets which
column of another is an accident of their order: the methods for products (`best_rank`) do not have that fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from florana.aggregate import validate
from florana.aggregate.mean import mean
from florana.errors import InputError
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution, LoraFactors


def widen(tensor: Tensor, rank: int, dim: int) -> Tensor:
    """The tensor with zeros appended along `dim` up to `rank`.

    Examples:
        >>> widen(torch.ones(1, 2), 3, dim=1)
        tensor([[1., 1., 0.]])
    """
    missing = rank - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)], dim=dim)


def padded(adapter: Adapter, rank: validate.Rank) -> Adapter:
    """Every module padded to one rank (or to its own), same products.

    Raises:
        InputError: a module has a higher rank already.
    """
    modules = {}
    for name, pair in adapter.modules.items():
        own = validate.rank_in(rank, name)
        if pair.rank > own:
            raise InputError(f"module '{name}' has rank {pair.rank}, which cannot be padded to {own}")
        modules[name] = LoraFactors(widen(pair.B, own, dim=1), widen(pair.A, own, dim=0), pair.scaling)
    return Adapter(modules, adapter.extra, adapter.cores)


def leading(adapter: Adapter, rank: int, scaling: float | None = None) -> Adapter:
    """The first `rank` columns of B and rows of A, as a client of that rank and scaling trains them.

    B is rescaled so that the first components of the product stay what they were: s_u B_u A_u = s B[:, :r_u] A[:r_u].
    Without a scaling, every module keeps its own.
    """
    modules = {}
    for name, pair in adapter.modules.items():
        own = pair.scaling if scaling is None else scaling
        modules[name] = LoraFactors(B=pair.B[:, :rank] * (pair.scaling / own), A=pair.A[:rank], scaling=own)
    return Adapter(modules, adapter.extra)


def tail(modules: Mapping[str, LoraFactors], rank: int) -> Tensor:
    """HetLoRA's measure of what lies beyond a rank: sum over modules of ||B[:, rank:]||_F ||A[rank:, :]||_F, a scalar.

    Differentiable; its gradient is zero where a factor is zero.

    Examples:
        >>> pair = LoraFactors(torch.tensor([[5.0, 3.0], [5.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]]), 1.0)
        >>> float(tail({"q": pair}, 1))
        10.0
    """
    norm = torch.linalg.vector_norm
    return torch.stack([norm(pair.B[:, rank:]) * norm(pair.A[rank:]) for pair in modules.values()]).sum()


def all_padded(parts: Sequence[Contribution], rank: validate.Rank) -> list[Contribution]:
    """Every contribution padded to one rank, or each module to its own."""
    return [replace(part, adapter=padded(part.adapter, rank)) for part in parts]


def norm_weighted_mean(parts: Sequence[Contribution], rank: validate.Rank) -> Adapter:
    """HetLoRA's answer: padded factors averaged with weights in proportion to the size of each client's update.

    Where no client moved at all, the given weights count. Extra tensors are averaged with the given weights.

    Raises:
        InputError: the contributions do not fit together, or a rank is above `rank`.

    Examples:
        >>> x = Adapter({"q": LoraFactors(torch.ones(2, 1), torch.ones(1, 2), 1.0)})
        >>> y = Adapter({"q": LoraFactors(torch.ones(2, 2), torch.ones(2, 2), 1.5)})
        >>> norm_weighted_mean([Contribution("x", x, 1), Contribution("y", y, 1)], rank=2).modules["q"].A
        tensor([[1.0000, 1.0000],
                [0.7500, 0.7500]])
    """
    weights = validate.shares(parts)
    columns = validate.columns(parts)
    squares = [0.0] * len(parts)
    for pairs in columns.values():
        for index, pair in enumerate(pairs):
            squares[index] += linalg.norm(linalg.stack([pair], [1.0])) ** 2
    sizes = [weight * square**0.5 for weight, square in zip(weights, squares, strict=True)]
    omegas = sizes if sum(sizes) > 0 else weights
    weighted = [replace(part, weight=omega) for part, omega in zip(all_padded(parts, rank), omegas, strict=True)]
    return Adapter(mean(weighted).modules, validate.average_extra(parts))
