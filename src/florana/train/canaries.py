"""Canaries: made-up rows, half of which are trained on, and how far each can be told from what a client released.

A row is one of the client's with its tokens replaced by one token of its own, over and over, and with an answer drawn
at random: its gradient points where no other row's does. What a client released in a round is then explained by
gradients at what it had received, of the canaries and of the client's other rows, which whoever attacks knows:

    w_received - w_released  ~  sum_i c_i g_i,    c = (G G^T + lambda I)^-1 G (w_received - w_released)

and a canary's score is the sum of its c_i over rounds, each round's change scaled to norm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from florana.lora.factors import Adapter
from florana.recipe.train_schema import Train
from florana.train.data.tokenize import IGNORED, Example
from florana.train.model import Workbench
from florana.train.own_streams import OwnStreams
from florana.train.private_steps import clipped_rows
from florana.train.stacked import Present, Stack

MEMORY = 2**30
"""Bytes of gradients that are held at once."""


@dataclass(frozen=True, eq=False)
class Canaries:
    """Of one client.

    Args:
        rows: all of them.
        included: whether each is trained on.
        scores: of each, as far as rounds were seen.
    """

    rows: Sequence[Example]
    included: Sequence[bool]
    scores: list[float] = field(default_factory=list)


def canaries(rows: Sequence[Example], count: int, seed: int) -> Canaries:
    """So many rows like a client's, each trained on with the probability 1/2.

    Args:
        rows: the client's; at least one.
        count: how many.
        seed: of all that is drawn.

    Examples:
        >>> own = canaries([Example((1, 5, 6, 2), (), (0,)), Example((1, 7, 8, 2), (), (1,))], 4, seed=0)
        >>> len({row.ids[1] for row in own.rows}), [row.ids[1] == row.ids[2] for row in own.rows], own.scores
        (4, [True, True, True, True], [0.0, 0.0, 0.0, 0.0])
    """
    rng = np.random.default_rng(seed)
    inner = sorted({token for row in rows for token in row.ids[1:-1]}) or [0]
    answers = sorted({row.labels[0] for row in rows})
    made = []
    for token in rng.choice(inner, size=count, replace=len(inner) < count).tolist():
        like = rows[int(rng.integers(len(rows)))]
        ids = (like.ids[0], *[token] * (len(like.ids) - 2), like.ids[-1]) if len(like.ids) > 1 else like.ids
        made.append(replace(like, ids=ids, labels=_answer(like, ids, answers, rng)))
    return Canaries(made, [bool(flip) for flip in rng.integers(0, 2, count)], [0.0] * count)


def _answer(like: Example, ids: Sequence[int], answers: Sequence[Any], rng: np.random.Generator) -> Any:
    if len(like.labels) == 1:
        return (answers[int(rng.integers(len(answers)))],)
    return tuple(IGNORED if label == IGNORED else token for label, token in zip(like.labels, ids, strict=True))


def watch(
    own: Canaries,
    others: Sequence[Example],
    bench: Workbench,
    received: Adapter,
    released: Mapping[str, Tensor],
    settings: Train,
    trains: Sequence[str],
    clip: float,
) -> None:
    """Add one round to the scores.

    Args:
        own: the client's canaries.
        others: its other rows, of which as many are used as fit into `MEMORY`.
        bench: the model, with the residual of this client on it.
        received: before the training.
        released: what was trained, by the names of `Adapter.tensors`.
        settings: the recipe's section.
        trains: the kinds that are trained.
        clip: C.
    """
    most = min(settings.batch_size, len(own.rows))
    present = Present(torch.arange(most, device=bench.device), True, OwnStreams([0], bench.device))
    stack = Stack(bench, [received] * most, trains, [None] * most, present)
    before = received.tensors()
    moved = torch.cat([(before[name] - released[name]).flatten() for name in stack.trained_names])
    rows = [*own.rows, *others[: max(0, MEMORY // (4 * len(moved)) - len(own.rows))]]
    bench.model.eval()  # without dropout: the same gradient for whoever computes it
    with stack.placed():
        pieces = list(clipped_rows(bench, stack, present, rows, settings, clip))
    gradients = torch.cat([torch.cat([part.flatten(1) for part in piece], dim=1) for piece in pieces]).cpu()
    found = explained_by(gradients, moved)[: len(own.rows)].tolist()
    own.scores[:] = [known + new for known, new in zip(own.scores, found, strict=True)]


def explained_by(gradients: Tensor, moved: Tensor) -> Tensor:
    """c of the change scaled to norm 1, lambda a tenth of the mean square of a gradient's norm: (rows,), float64.

    Args:
        gradients: G, (rows, numbers).
        moved: (numbers,).

    Examples:
        >>> explained_by(torch.eye(2, 3), torch.tensor([2.0, 0.0, 0.0])).round(decimals=2).tolist()
        [0.91, 0.0]
    """
    gram = (gradients @ gradients.T).double()
    straight = (gradients @ moved).double() / max(float(moved.double().norm()), 1e-30)
    ridge = 0.1 * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(gram + ridge, straight)
    return solved


def guessed(all_: Sequence[Canaries]) -> tuple[int, int]:
    """(guesses, right ones): of each client the quarter of highest scores is said to be in, the lowest quarter out.

    Examples:
        >>> guessed([Canaries([], [True, True, False, False], [4.0, 3.0, 2.0, 1.0])])
        (2, 2)
    """
    guesses = right = 0
    for own in all_:
        order = np.argsort(np.asarray(own.scores), kind="stable")
        quarter = len(order) // 4
        inside = np.asarray(own.included)[order]
        guesses += 2 * quarter
        right += int((~inside[:quarter]).sum() + inside[len(order) - quarter :].sum())
    return guesses, right
