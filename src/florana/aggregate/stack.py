"""The exact sum, as one adapter of rank R = sum r_u (FLoRA's stacking, Wang et al., arXiv 2409.05976).

    B_hat = [w_1 s_1/s B_1, ..., w_U s_U/s B_U]        A_hat = [A_1; ...; A_U]        s B_hat A_hat = target

The weight stands on one factor only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from florana.aggregate import validate
from florana.aggregate.cores import folded
from florana.lora.factors import Adapter, Contribution, LoraFactors


def concatenate(pairs: Sequence[LoraFactors], coefficients: Sequence[float]) -> LoraFactors:
    """sum_u coefficient_u s_u B_u A_u as LoRA factors of rank sum r_u, scaled by the largest s_u."""
    scaling = validate.output_scaling(pairs)
    Bs, As = validate.unscaled(pairs, scaling)
    B = torch.cat([c * B_u for c, B_u in zip(coefficients, Bs, strict=True)], dim=1)
    dtype = pairs[0].A.dtype
    return LoraFactors(B=B.to(dtype), A=torch.cat(As, dim=0).to(dtype), scaling=scaling)


def stack(parts: Sequence[Contribution]) -> Adapter:
    """The adapter whose product is the true weighted sum, exactly; ranks and scalings may differ.

    Raises:
        InputError: the contributions do not fit together (client, module and shapes named).

    Examples:
        >>> one = Adapter({"q": LoraFactors(torch.ones(3, 2), torch.ones(2, 2), 0.5)})
        >>> stack([Contribution("a", one, 1), Contribution("b", one, 1)]).modules["q"].rank
        4
    """
    weights = validate.shares(parts)
    modules = {name: concatenate(pairs, weights) for name, pairs in validate.columns(parts).items()}
    return Adapter(modules, validate.average_extra(parts))


def combined(adapter: Adapter, residual: Adapter | None) -> Adapter:
    """An adapter and its frozen residual as one plain adapter of the added rank: what PEFT loads as a whole."""
    plain = folded(adapter)
    if residual is None:
        return plain
    modules = {
        name: concatenate([pair, residual.modules[name]], [1.0, 1.0]) if name in residual.modules else pair
        for name, pair in plain.modules.items()
    }
    return Adapter(modules, plain.extra)
