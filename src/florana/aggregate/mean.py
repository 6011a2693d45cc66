"""FedIT: the factors averaged apart (Zhang et al., "Towards Building the Federated GPT", arXiv 2305.05644).

    B_hat = sum_u w_u (s_u / s) B_u        A_hat = sum_u w_u A_u

The product of the means is not the mean of the products: the difference is the weighted covariance of B and A
across clients, sum_u w_u (B_u - B_hat)(A_u - A_hat) for equal scalings. It is the reference every rule is held to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from florana.aggregate import inputs
from florana.factors import Adapter, Contribution, LoraFactors


def mean(parts: Sequence[Contribution]) -> Adapter:
    """The adapter of averaged factors, of the clients' rank and dtype; extra tensors are averaged too.

    Args:
        parts: one contribution per client; equal ranks; weights on any scale.

    Raises:
        InputError: the contributions do not fit together (client, module and shapes named).

    >>> ones = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 1.0)})
    >>> threes = Adapter({"q": LoraFactors(3 * torch.ones(3, 1), torch.ones(1, 2), 1.0)})
    >>> mean([Contribution("a", ones, 1), Contribution("b", threes, 3)]).modules["q"].B[0]
    tensor([2.5000])
    """
    weights = inputs.shares(parts)
    modules: dict[str, LoraFactors] = {}
    for name, pairs in inputs.columns(parts).items():
        inputs.same_rank(parts, name, pairs, "mean")
        scaling = inputs.output_scaling(pairs)
        Bs, As = inputs.unscaled(pairs, scaling)
        B, A = torch.zeros_like(Bs[0]), torch.zeros_like(As[0])
        for weight, B_u, A_u in zip(weights, Bs, As, strict=True):
            B += weight * B_u
            A += weight * A_u
        dtype = pairs[0].A.dtype
        modules[name] = LoraFactors(B=B.to(dtype), A=A.to(dtype), scaling=scaling)
    return Adapter(modules, inputs.average_extra(parts))
