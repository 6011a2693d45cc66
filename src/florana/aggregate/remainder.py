"""The mean of factors plus the exact remainder, kept factored: FedEx-LoRA (Singhal et al., arXiv 2410.09432).

    E = sum_u w_u s_u B_u A_u - s B_hat A_hat        B_hat, A_hat = the factor means

For equal scalings E is the weighted covariance of the factors across clients, of rank at most (U - 1) r. The paper
folds E into the base weights as a dense matrix; here it stays a product of two thin factors beside the adapter, so that
quantised bases and PEFT export keep working. The paper averages unweighted; here the weights are the contributions'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from florana.aggregate.best_rank.project import each_target
from florana.aggregate.carried import recompressed
from florana.aggregate.mean import mean
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution


@dataclass(frozen=True, eq=False)
class Remaindered:
    """The factor means, and what they miss; None, or without a module, where nothing is missed."""

    adapter: Adapter
    remainder: Adapter | None


def mean_and_remainder(parts: Sequence[Contribution], rank: int | None = None) -> Remaindered:
    """The factor means, and what they miss of the true sum (what clients carried frozen included).

    Args:
        parts: one contribution per client; equal ranks; weights on any scale.
        rank: keep only the leading singular components of the remainder; None keeps it exact to the rounding of
            float32.

    Raises:
        InputError: the contributions do not fit together (client, module and shapes named).

    Examples:
        >>> import torch
        >>> from florana.lora.factors import LoraFactors
        >>> x = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 1.0)})
        >>> y = Adapter({"q": LoraFactors(3 * torch.ones(3, 1), 3 * torch.ones(1, 2), 1.0)})
        >>> both = mean_and_remainder([Contribution("x", x, 1), Contribution("y", y, 1)])
        >>> pair, rest = both.adapter.modules["q"], both.remainder.modules["q"]
        >>> round(float((pair.B @ pair.A + rest.B @ rest.A)[0, 0]), 4)  # (1 + 9) / 2
        5.0
    """
    averaged = mean(parts)
    missed = {
        name: linalg.join(target, linalg.stack([averaged.modules[name]], [1.0]), sign=-1.0)
        for name, (target, _, _) in each_target(parts)
    }
    dtype = next(iter(averaged.modules.values())).A.dtype
    return Remaindered(averaged, recompressed(missed, rank, dtype))
