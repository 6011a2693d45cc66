"""FedRot-LoRA: turn every client's factors towards a common reference, then average (arXiv 2602.23638).

    O_u = argmin_{O orthogonal} || B_u O - B_ref ||_F^2 + || O^T A_u - A_ref ||_F^2 = L V^T,
    L S V^T the SVD of B_u^T B_ref + A_u A_ref^T                          (orthogonal Procrustes)

B_u O_u and O_u^T A_u have the same product as B_u and A_u: only the part of the averaging error that comes from unlike
bases of the same space goes away. Written from the abstract and notes: the paper's text was not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from florana.aggregate import inputs
from florana.aggregate.mean import mean
from florana.factors import Adapter, Contribution, LoraFactors


def align(pair: LoraFactors, reference: LoraFactors) -> LoraFactors:
    """The pair turned by the orthogonal r x r matrix that brings it nearest to the reference; same product.

    >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> here = LoraFactors(torch.eye(3)[:, :2], torch.eye(2), 1.0)
    >>> away = LoraFactors(here.B @ turn, turn.T @ here.A, 1.0)
    >>> bool(torch.allclose(align(away, here).B, here.B))
    True
    """
    B, A = pair.B.double(), pair.A.double()
    towards = B.T @ reference.B.double() + A @ reference.A.double().T  # (r, r)
    left, _, right = torch.linalg.svd(towards)
    turn = left @ right
    return LoraFactors(B=(B @ turn).to(pair.B.dtype), A=(turn.T @ A).to(pair.A.dtype), scaling=pair.scaling)


def rotated_mean(parts: Sequence[Contribution], reference: Adapter) -> Adapter:
    """The factor means after aligning every client to `reference` (the last broadcast).

    Raises:
        InputError: the contributions (or the reference) do not fit together, or the ranks differ.
    """
    columns = inputs.columns(parts)
    start = Contribution("the last broadcast", reference, 1.0)
    for name, pairs in columns.items():
        inputs.same_rank([*parts, start], name, [*pairs, reference.modules[name]], "fedrot")
    turned = [
        Contribution(
            part.client,
            Adapter(
                {name: align(pair, reference.modules[name]) for name, pair in part.adapter.modules.items()},
                part.adapter.extra,
            ),
            part.weight,
        )
        for part in parts
    ]
    return mean(turned)
