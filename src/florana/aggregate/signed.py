"""Sums with any finite weights, as they stand: task arithmetic (Ilharco et al., "Editing models with task arithmetic",
arXiv 2212.04089).

    target = sum_u w_u s_u B_u A_u = c sum_u v_u s_u (sign(w_u) B_u) A_u,   c = sum_u |w_u|,   v_u = |w_u| / c

The v_u are shares, so every rule answers the second form as it answers a mean; the sign stands on B alone, c in the
scaling. A rule that averages the factors apart then gives the exact sum for twins, which +w and -w on both factors
would not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from florana.aggregate.validate import require_finite
from florana.errors import InputError
from florana.lora.factors import Adapter, Contribution

Rule = Callable[[Sequence[Contribution]], Adapter]

ONE = 1e-9
"""Weights whose sum is so near to 1 make a mean: tensors that are trained whole have one."""


def weighted_sum(rule: Rule, parts: Sequence[Contribution]) -> Adapter:
    """The rule's answer to the sum of the contributions with their weights as they are, not divided by their sum.

    Args:
        rule: of contributions with positive weights, like `mean` or `lambda parts: best_rank(parts, 8)`.
        parts: weights of any sign and sum, finite, not all zero.

    Raises:
        InputError: a weight is not finite; all are zero; there are tensors trained whole (heads) and the weights do not
            sum to 1: such a tensor is the base model's plus a change, and the base model's is not known here. And what
            the rule raises.

    Examples:
        >>> import torch
        >>> from florana import Contribution, LoraFactors, mean
        >>> pair = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 1.0)})
        >>> twins = [Contribution("a", pair, 1.0), Contribution("b", pair, -0.5)]
        >>> out = weighted_sum(mean, twins).modules["q"]
        >>> round(float(out.scaling * (out.B @ out.A)[0, 0]), 4)
        0.5
    """
    for part in parts:
        if not math.isfinite(part.weight):
            raise InputError(f"client '{part.client}': the weight {part.weight} is not a finite number")
    weights = [part.weight for part in parts]
    plain = [replace(part, adapter=Adapter(part.adapter.modules, cores=part.adapter.cores)) for part in parts]
    answer = rule([_positive(part) for part in plain])
    size = math.fsum(map(abs, weights))
    size = 1.0 if math.isclose(size, 1.0, rel_tol=1e-12) else size  # shares: their sum is 1 but for rounding
    modules = {name: replace(pair, scaling=size * pair.scaling) for name, pair in answer.modules.items()}
    return Adapter(modules, _whole_tensors(parts, weights))


def whole_tensor(name: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_u w_u T_u of a tensor that is trained whole, in float64, stored in the widest type of the inputs.

    Raises:
        InputError: the weights do not sum to 1.
    """
    total = math.fsum(weights)
    if abs(total - 1.0) > ONE:
        raise InputError(
            f"the tensor '{name}' is trained whole, and the weights sum to {total:.6g}, not to 1",
            why="such a tensor is the base model's plus a change; weights of another sum would need the base model's "
            "own, which is not known here",
            fix="give weights that sum to 1, or have them divided by their sum",
        )
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    whole = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        whole.add_(tensor, alpha=weight)
    return whole.to(dtype)


def _whole_tensors(parts: Sequence[Contribution], weights: Sequence[float]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for part in parts:
        for name in part.adapter.extra:
            tensors = [other.adapter.extra.get(name) for other in parts]
            known = [tensor for tensor in tensors if tensor is not None]
            if len(known) < len(parts) or any(tensor.shape != known[0].shape for tensor in known):
                raise InputError(f"the tensor '{name}' is not the same size in all contributions, or missing in one")
            result[name] = whole_tensor(name, known, weights)
            require_finite(result[name], f"the sum of the tensor '{name}'")
    return result


def _positive(part: Contribution) -> Contribution:
    """The contribution with a positive weight, the sign on its factors B."""
    if part.weight >= 0:
        return part
    residual = None if part.residual is None else _turned(part.residual)
    return replace(part, adapter=_turned(part.adapter), residual=residual, weight=-part.weight)


def _turned(adapter: Adapter) -> Adapter:
    modules = {name: replace(pair, B=-pair.B) for name, pair in adapter.modules.items()}
    return Adapter(modules, cores=adapter.cores)
