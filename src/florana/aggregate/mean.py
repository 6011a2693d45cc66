"""FedIT: the factors averaged apart (Zhang et al., "Towards Building the Federated GPT", arXiv 2305.05644).

    B_hat = sum_u w_u (s_u / s) B_u        A_hat = sum_u w_u A_u

The product of the means is not the mean of the products: the difference is the weighted covariance of B and A
across clients, sum_u w_u (B_u - B_hat)(A_u - A_hat) for equal scalings. It is the reference every rule is held to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.aggregate import validate
from florana.lora.factors import Adapter, Contribution, LoraFactors


def mean(parts: Sequence[Contribution]) -> Adapter:
    """The adapter of averaged factors, of the clients' rank and dtype; extra tensors are averaged too.

    Args:
        parts: one contribution per client; equal ranks; weights on any scale.

    Raises:
        InputError: the contributions do not fit together (client, module and shapes named).

    Examples:
        >>> ones = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 1.0)})
        >>> threes = Adapter({"q": LoraFactors(3 * torch.ones(3, 1), torch.ones(1, 2), 1.0)})
        >>> mean([Contribution("a", ones, 1), Contribution("b", threes, 3)]).modules["q"].B[0]
        tensor([2.5000])
    """
    weights = validate.shares(parts)
    modules: dict[str, LoraFactors] = {}
    for name, pairs in validate.matched(parts).items():
        validate.same_rank(parts, name, pairs, "mean")
        scaling = validate.output_scaling(pairs)
        B, A = mean_of_b(pairs, weights, scaling), mean_of_a(pairs, weights)
        # A NaN or an infinity stays one in a weighted sum, whatever its weight: so every input is checked by looking
        # at the two sums, without a pass of its own over all clients.
        if not (validate.is_finite(B) and validate.is_finite(A)):
            validate.require_finite_factors(parts, name, pairs)
        dtype = pairs[0].A.dtype
        modules[name] = LoraFactors(B=B.to(dtype), A=A.to(dtype), scaling=scaling)
    return Adapter(modules, validate.average_extra(parts))


def mean_of_b(pairs: Sequence[LoraFactors], weights: Sequence[float], scaling: float) -> Tensor:
    """sum_u w_u (s_u / s) B_u in at least float32, each factor read once; lower ranks are padded with zeros.

    Args:
        pairs: LoRA factors, one per client: B (out, r_u), A (r_u, in).
        weights: w_u, one per client.
        scaling: s, that of the result.

    Examples:
        >>> low, high = (LoraFactors(torch.ones(1, r), torch.ones(r, 1), scaling=float(r)) for r in (1, 2))
        >>> mean_of_b([low, high], [0.5, 0.5], scaling=2.0)
        tensor([[0.7500, 0.5000]])
    """
    out, rank = pairs[0].shape[0], max(pair.rank for pair in pairs)
    total = pairs[0].B.new_zeros((out, rank), dtype=torch.promote_types(pairs[0].B.dtype, torch.float32))
    for pair, weight in zip(pairs, weights, strict=True):
        total[:, : pair.rank].add_(pair.B, alpha=weight * (pair.scaling / scaling))
    return total


def mean_of_a(pairs: Sequence[LoraFactors], weights: Sequence[float]) -> Tensor:
    """sum_u w_u A_u in at least float32, each factor read once; lower ranks are padded with zeros."""
    into, rank = pairs[0].shape[1], max(pair.rank for pair in pairs)
    total = pairs[0].A.new_zeros((rank, into), dtype=torch.promote_types(pairs[0].A.dtype, torch.float32))
    for pair, weight in zip(pairs, weights, strict=True):
        total[: pair.rank].add_(pair.A, alpha=weight)
    return total
