"""One factor averaged, the other one shared: exact, because the product is linear in the factor that moved.

    A_u = A for all u:   s B_hat A = sum_u w_u s_u B_u A,     B_hat = sum_u w_u (s_u / s) B_u
    B_u = B for all u:   s B A_hat = sum_u w_u s_u B A_u,     A_hat = sum_u w_u (s_u / s) A_u

FFA-LoRA (arXiv 2403.12313) keeps A for ever, RoLoRA (arXiv 2502.01755) alternates. The shared factor comes out as it
went in, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.aggregate import validate
from florana.aggregate.heterogeneous import widen
from florana.errors import InputError
from florana.lora.factors import Adapter, Contribution, LoraFactors


def mean_of_B(parts: Sequence[Contribution], shared: Adapter) -> Adapter:  # noqa: N802  (B is the field's name)
    """B averaged, A that of `shared`; a client of a lower rank r_u must hold the first r_u rows of that A.

    Raises:
        InputError: the contributions do not fit together, or a client's A is not the shared one.

    Examples:
        >>> x, y = (Adapter({"q": LoraFactors(torch.full((3, 1), b), torch.ones(1, 2), 1.0)}) for b in (1.0, 3.0))
        >>> mean_of_B([Contribution("x", x, 1), Contribution("y", y, 1)], shared=x).modules["q"].B[0]
        tensor([2.])
    """
    weights = validate.shares(parts)
    modules: dict[str, LoraFactors] = {}
    for name, pairs in validate.columns(parts).items():
        kept = shared.modules[name]
        for part, pair in zip(parts, pairs, strict=True):
            _require_equal(pair.A, kept.A[: pair.rank], part.client, name, "A")
        scaled = [p.B.to(_wide(p.B)) * (w * p.scaling / kept.scaling) for p, w in zip(pairs, weights, strict=True)]
        total = sum((widen(B, kept.rank, dim=1) for B in scaled), torch.zeros_like(kept.B, dtype=_wide(kept.B)))
        modules[name] = LoraFactors(B=total.to(kept.B.dtype), A=kept.A, scaling=kept.scaling)
    return Adapter(modules, validate.average_extra(parts))


def mean_of_A(parts: Sequence[Contribution], shared: Adapter) -> Adapter:  # noqa: N802
    """A averaged, B that of `shared`.

    Raises:
        InputError: the contributions do not fit together, or a client's B is not the shared one.

    Examples:
        >>> x, y = (Adapter({"q": LoraFactors(torch.ones(3, 1), torch.full((1, 2), a), 1.0)}) for a in (1.0, 3.0))
        >>> mean_of_A([Contribution("x", x, 3), Contribution("y", y, 1)], shared=x).modules["q"].A
        tensor([[1.5000, 1.5000]])
    """
    weights = validate.shares(parts)
    modules: dict[str, LoraFactors] = {}
    for name, pairs in validate.columns(parts).items():
        kept = shared.modules[name]
        for part, pair in zip(parts, pairs, strict=True):
            _require_equal(pair.B, kept.B, part.client, name, "B")
        scaled = [p.A.to(_wide(p.A)) * (w * p.scaling / kept.scaling) for p, w in zip(pairs, weights, strict=True)]
        total = sum(scaled, torch.zeros_like(kept.A, dtype=_wide(kept.A)))
        modules[name] = LoraFactors(B=kept.B, A=total.to(kept.A.dtype), scaling=kept.scaling)
    return Adapter(modules, validate.average_extra(parts))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _require_equal(own: Tensor, shared: Tensor, client: str, module: str, letter: str) -> None:
    if own.shape != shared.shape or not torch.equal(own, shared):
        raise InputError(
            f"module '{module}': factor {letter} of client '{client}' is {tuple(own.shape)} and not the shared one, "
            f"{tuple(shared.shape)}",
            why=f"this method keeps {letter} the same for every client",
        )
