"""FedRot-LoRA: turn every client's factors towards a common reference, then average (arXiv 2602.23638).

As published, one factor is aligned at a time and the rotation is softened by a strength lambda in [0, 1]:

    R_u = argmin_{R rotation} || R^T A_u - A_ref ||_F      (or || B_u R - B_ref ||_F),   det R = 1
    O_u = the rotation nearest to (1 - lambda) I + lambda R_u
    B = sum_u w_u B_u O_u,    A = sum_u w_u O_u^T A_u

The joint variant aligns both factors at once, by any orthogonal matrix (Procrustes):

    O_u = argmin_{O orthogonal} || B_u O - B_ref ||_F^2 + || O^T A_u - A_ref ||_F^2 = L V^T,
    L S V^T the SVD of B_u^T B_ref + A_u A_ref^T

B_u O_u and O_u^T A_u have the same product as B_u and A_u: only the part of the averaging error that comes from unlike
bases of the same space goes away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from florana.aggregate import validate
from florana.aggregate.mean import mean
from florana.lora.factors import Adapter, Contribution, LoraFactors

Turn = Callable[[LoraFactors, LoraFactors], Tensor]
"""(a client's factors, the reference) -> the orthogonal O (r, r), float64."""


def jointly(pair: LoraFactors, reference: LoraFactors) -> Tensor:
    """The orthogonal matrix that brings both factors nearest to the reference's."""
    left, _, right = torch.linalg.svd(_towards_B(pair, reference) + _towards_A(pair, reference))
    turn: Tensor = left @ right
    return turn


def by_A(strength: float) -> Turn:  # noqa: N802  (A is the field's name)
    """The rotation that brings A nearest to the reference's, softened; B goes along."""
    return lambda pair, reference: softened(rotation(_towards_A(pair, reference)), strength)


def by_B(strength: float) -> Turn:  # noqa: N802
    """The rotation that brings B nearest to the reference's, softened; A goes along."""
    return lambda pair, reference: softened(rotation(_towards_B(pair, reference)), strength)


def rotation(towards: Tensor) -> Tensor:
    """The rotation R (determinant 1) of largest trace(R^T towards), for towards (r, r) (Kabsch, 1976).

    Examples:
        >>> rotation(torch.diag(torch.tensor([3.0, -1.0], dtype=torch.float64)))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    left, _, right = torch.linalg.svd(towards)
    last = torch.ones(len(towards), dtype=towards.dtype)
    last[-1] = torch.linalg.det(left @ right).sign()
    turn: Tensor = (left * last) @ right
    return turn


def softened(turn: Tensor, strength: float) -> Tensor:
    """The rotation nearest to (1 - strength) I + strength turn."""
    return rotation((1 - strength) * torch.eye(len(turn), dtype=turn.dtype) + strength * turn)


def align(pair: LoraFactors, reference: LoraFactors, turn: Turn = jointly) -> LoraFactors:
    """The factors turned towards the reference; same product.

    Args:
        pair: the client's factors, B (out, r) and A (r, in).
        reference: the factors of the last broadcast, of the same shapes.
        turn: `jointly`, `by_A(strength)` or `by_B(strength)`.

    Examples:
        >>> quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> here = LoraFactors(torch.eye(3)[:, :2], torch.eye(2), 1.0)
        >>> away = LoraFactors(here.B @ quarter, quarter.T @ here.A, 1.0)
        >>> bool(torch.allclose(align(away, here).B, here.B))
        True
    """
    O = turn(pair, reference)  # noqa: E741  (the field's name)
    B, A = pair.B.double() @ O, O.T @ pair.A.double()
    return LoraFactors(B=B.to(pair.B.dtype), A=A.to(pair.A.dtype), scaling=pair.scaling)


def rotated_mean(parts: Sequence[Contribution], reference: Adapter, turn: Turn = jointly) -> Adapter:
    """The factor means after aligning every client to `reference` (the last broadcast).

    Args:
        parts: one contribution per client.
        reference: the last broadcast.
        turn: `jointly`, `by_A(strength)` or `by_B(strength)`.

    Raises:
        InputError: the contributions (or the reference) do not fit together, or the ranks differ.
    """
    columns = validate.columns(parts)
    start = Contribution("the last broadcast", reference, 1.0)
    for name, pairs in columns.items():
        validate.same_rank([*parts, start], name, [*pairs, reference.modules[name]], "fedrot")
    turned = [
        Contribution(
            part.client,
            Adapter(
                {name: align(pair, reference.modules[name], turn) for name, pair in part.adapter.modules.items()},
                part.adapter.extra,
            ),
            part.weight,
        )
        for part in parts
    ]
    return mean(turned)


def _towards_A(pair: LoraFactors, reference: LoraFactors) -> Tensor:  # noqa: N802
    return pair.A.double() @ reference.A.double().T


def _towards_B(pair: LoraFactors, reference: LoraFactors) -> Tensor:  # noqa: N802
    return pair.B.double().T @ reference.B.double()
