"""LoRA-FAIR: keep the mean A, correct the mean B towards the true sum (Bian et al., arXiv 2411.14961).

    A_hat = sum_u w_u A_u        B_hat = sum_u w_u B_u + dB
    dB = argmin || (B_mean + dB) A_hat - target / s ||_F^2 + lambda || dB ||_F^2
       = E A_hat^T (A_hat A_hat^T + lambda I)^-1,      E = target / s - B_mean A_hat

The paper minimises a similarity plus the same penalty by gradient descent; this is the ridge form, which has a closed
solution. Only r x r and (out x r) matrices appear. Lambda is relative: it multiplies the mean eigenvalue of A_hat
A_hat^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from florana.aggregate import validate
from florana.errors import InputError
from florana.lora.factors import Adapter, Contribution, LoraFactors


def corrected_mean(parts: Sequence[Contribution], penalty: float = 0.01) -> Adapter:
    """The factor means with B corrected; extra tensors are averaged.

    Args:
        parts: one contribution per client; equal ranks; weights on any scale.
        penalty: lambda, at least 0; a large one gives FedIT, 0 the least error for that A.

    Raises:
        InputError: the contributions do not fit together, or the penalty is negative.

    Examples:
        >>> x = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 1.0)})
        >>> y = Adapter({"q": LoraFactors(3 * torch.ones(3, 1), 3 * torch.ones(1, 2), 1.0)})
        >>> pair = corrected_mean([Contribution("x", x, 1), Contribution("y", y, 1)], penalty=0.0).modules["q"]
        >>> round(float((pair.B @ pair.A)[0, 0]), 4)
        5.0
    """
    if not penalty >= 0:
        raise InputError(f"the penalty {penalty} is not at least 0")
    weights = validate.shares(parts)
    modules: dict[str, LoraFactors] = {}
    for name, pairs in validate.columns(parts).items():
        rank = validate.same_rank(parts, name, pairs, "lora-fair")
        scaling = validate.output_scaling(pairs)
        Bs, As = validate.unscaled(pairs, scaling)
        wide = [(B_u.double(), A_u.double()) for B_u, A_u in zip(Bs, As, strict=True)]
        A = sum((w * A_u for w, (_, A_u) in zip(weights, wide, strict=True)), torch.zeros_like(wide[0][1]))
        B = sum((w * B_u for w, (B_u, _) in zip(weights, wide, strict=True)), torch.zeros_like(wide[0][0]))
        gram = A @ A.T  # (r, r)
        missed = -B @ gram  # E A^T, (out, r), summed client by client
        for weight, (B_u, A_u) in zip(weights, wide, strict=True):
            missed += weight * B_u @ (A_u @ A.T)
        ridge = gram + min(penalty, 1e30) * gram.trace() / rank * torch.eye(rank, dtype=gram.dtype, device=gram.device)
        correction = missed @ torch.linalg.pinv(ridge, hermitian=True)
        dtype = pairs[0].A.dtype
        modules[name] = LoraFactors(B=(B + correction).to(dtype), A=A.to(dtype), scaling=scaling)
    return Adapter(modules, validate.average_extra(parts))
