"""What a client minimises beside the model's own loss: smoothed labels, and the distance from what it was sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from florana.train.data.tokenize import IGNORED, Example


def predictions(examples: Sequence[Example]) -> int:
    """How many predictions a loss over these rows is the mean of: rows, or tokens after the first that count.

    Examples:
        >>> rows = [Example((5, 6, 7), (), (5, -100, 7)), Example((6, 8, 9), (), (-100, 8, 9))]
        >>> predictions(rows), predictions([Example((5, 6), (), (1,))])
        (3, 1)
    """
    if all(len(row.labels) == 1 for row in examples):
        return len(examples)
    return sum(label != IGNORED for row in examples for label in row.labels[1:])


def smoothed(output: Any, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy with targets (1 - e) y + e / K, of classes (batch,) or of the tokens that follow (batch, time).

    Args:
        output: the model's, with its logits.
        labels: as in the batch.
        smoothing: e.
    """
    logits = output.logits.float()
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=smoothing)


def proximal(parameters: Sequence[Tensor], mu: float) -> Callable[[], Tensor]:
    """mu / 2 sum ||w - w_0||^2, with w_0 the parameters as they are now (FedProx, arXiv 1812.06127).

    Args:
        parameters: what is trained.
        mu: the term's weight.

    Examples:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> term = proximal([w], 0.5)
        >>> with torch.no_grad():
        ...     _ = w.fill_(2.0)
        >>> float(term().detach())
        2.0
    """
    received = [parameter.detach().clone() for parameter in parameters]

    def term() -> Tensor:
        total = torch.zeros((), device=received[0].device)
        for parameter, before in zip(parameters, received, strict=True):
            total = total + (parameter - before).square().sum()
        return 0.5 * mu * total

    return term
