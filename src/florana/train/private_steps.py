"""DP-SGD (Abadi et al. 2016) for whatever an adapter trains: rows by Poisson sampling, clipped one by one, and noise.

    g = ( sum over sampled rows of g_i min(1, C / || g_i ||)  +  sigma C N(0, I) ) / L

with g_i the gradient of one row's own loss in all that is trained, and L the expected number of rows. The optimizer,
the schedule, `max_grad_norm` and terms that look at no row come after: they cost nothing.

Each row is one client of a cohort (`train.stacked`): its factors are an own copy, so that one backward pass gives every
row's gradient. Dropout comes from the secret key too: which row gets which mask depends on the rows beside it, so
whoever knew the masks would learn more than the noise allows for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from florana.dp.noise import Draws
from florana.lora.factors import Adapter
from florana.recipe.train_schema import Train
from florana.strategy.base import Pruning
from florana.train.client import diverged, require_rows, rows_per_step, steps_per_round
from florana.train.cohort import losses
from florana.train.data.tokenize import Example
from florana.train.local_loss import predictions, proximal
from florana.train.model import Workbench
from florana.train.optimizer import curve, optimizer_of
from florana.train.own_streams import OwnStreams
from florana.train.pruning import penalty_of
from florana.train.stacked import Present, Stack

AT_ONCE = 32
"""Rows of one pass, of about one length: a batch of MiniLM's in one pass of its longest row took four times as long."""


@dataclass(frozen=True)
class Noise:
    """How rows are hidden.

    Args:
        clip: C, above 0.
        multiplier: sigma; 0 adds none, and hides nothing.
        key: 32 bytes, from which rows are sampled, dropout and noise are drawn: secret, and new for each training.
    """

    clip: float
    multiplier: float
    key: bytes


def train_privately(
    bench: Workbench,
    adapter: Adapter,
    examples: Sequence[Example],
    settings: Train,
    trains: Collection[str],
    noise: Noise,
    *,
    blocks: Collection[int] | None = None,
    pruning: Pruning | None = None,
    stepped: Callable[[], None] = lambda: None,
    place: tuple[int, int] = (1, 1),
) -> dict[str, Tensor]:
    """What the client has trained, by the names of `Adapter.tensors`, on the CPU.

    Args:
        bench: the model, with the residual of this client on it.
        adapter: what it starts from.
        examples: its rows.
        settings: the recipe's section; a step takes `batch_size` rows at once, and as many steps as anywhere.
        trains: the kinds of tensors that are trained.
        noise: how rows are hidden.
        blocks: of its cores those that it trains; None for all.
        pruning: the permission to prune, if any.
        stepped: called after each optimizer step.
        place: the round's number, from 1, and how many the run has.

    Raises:
        FloranaError: there are no rows, or what was trained is no longer finite.
    """
    require_rows(examples)
    bench.model.train()
    most, expected = min(settings.batch_size, len(examples), AT_ONCE), rows_per_step(settings, len(examples))
    draws = Draws(noise.key)
    streams = OwnStreams([draws.seed()], bench.device)
    present = Present(torch.arange(most, device=bench.device), True, streams)
    own = Stack(bench, [adapter], trains, [blocks], present)  # what the optimizer moves
    rows = Stack(bench, [adapter] * most, trains, [blocks] * most, present)
    parameters = own.trainable
    optimizer = optimizer_of(settings, parameters, own.second)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = steps_per_round(settings, len(examples))
    factor = curve(settings, steps, *place)
    terms = [penalty_of(own.factors(0), pruning)] if pruning is not None else []
    if settings.proximal_mu:
        terms.append(proximal(parameters, settings.proximal_mu))
    with rows.placed(), contextlib.ExitStack() as drawing:
        drawing.enter_context(streams)
        for step in range(steps):
            taken = [examples[row] for row in draws.chosen(len(examples), expected / len(examples))]
            sums = clipped_sums(bench, rows, present, taken, settings, noise.clip)
            for parameter, total in zip(parameters, sums, strict=True):
                drawn = draws.normal(*total.shape).to(total) if noise.multiplier else 0.0
                parameter.grad = ((total + noise.multiplier * noise.clip * drawn) / expected)[None]
            for term in terms:
                term().backward()  # type: ignore[no-untyped-call]
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=True)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step)
            optimizer.step()
            with torch.no_grad():
                for copies, parameter in zip(rows.trainable, parameters, strict=True):
                    copies.copy_(parameter)  # the optimizer's axis of one, over all rows
            stepped()
            if taken and not streams.drawn:
                drawing.close()  # nothing in this model draws: the mode costs time at every call
    trained = {name: stack.detach()[0].cpu().clone() for name, stack in own.stacks().items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained.values()):
        raise diverged(float("nan"))
    return trained


def clipped_sums(
    bench: Workbench, stack: Stack, present: Present, taken: Sequence[Example], settings: Train, clip: float
) -> list[Tensor]:
    """sum_i g_i min(1, C / || g_i ||) of each trained tensor, short rows first; arguments as in `clipped_rows`."""
    taken = sorted(taken, key=lambda row: len(row.ids))  # a pass is as wide as its longest row
    totals = [torch.zeros_like(parameter[0]) for parameter in stack.trainable]
    for piece in clipped_rows(bench, stack, present, taken, settings, clip):
        for total, rows in zip(totals, piece, strict=True):
            total += rows.sum(0)
    return totals


def clipped_rows(
    bench: Workbench, stack: Stack, present: Present, taken: Sequence[Example], settings: Train, clip: float
) -> Iterator[list[Tensor]]:
    """g_i min(1, C / || g_i ||) of each trained tensor, (rows, ...), as many rows at once as the stack holds copies.

    A row without predictions has no gradient and is left out; one whose gradient is not finite counts as zeros.

    Args:
        bench: the model.
        stack: copies of what is trained, placed on it.
        present: the stack's.
        taken: the rows; may be empty.
        settings: the recipe's section.
        clip: C.
    """
    parameters = stack.trainable
    most = len(parameters[0])
    taken = [row for row in taken if predictions([row])]
    for start in range(0, len(taken), most):
        piece = taken[start : start + most]
        present.clients = torch.arange(len(piece), device=bench.device)
        present.all = len(piece) == most
        present.streams.of([0] * len(piece))
        for parameter in parameters:
            parameter.grad = None
        losses(bench, [([row], 1.0) for row in piece], settings)[1].sum().backward()  # type: ignore[no-untyped-call]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        grads = [grad[: len(piece)] for grad in grads]
        norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1).double(), dim=1) for grad in grads])
        whole = torch.linalg.vector_norm(norms, dim=0)  # (rows,)
        scale = torch.where(torch.isfinite(whole), clip / whole.clamp(min=clip), 0.0)
        yield [
            torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0) * scale.to(grad).reshape(-1, *[1] * (grad.ndim - 1))
            for grad in grads
        ]
