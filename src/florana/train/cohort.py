"""Several clients trained in one forward and backward pass: the base once, everything that is trained per client.

The loss of a batch is the sum of the clients' own losses. No row of one client meets a row of another, so the gradient
of each client's stack is the one that it has alone; clipping, optimizer state and step counts are its own too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from florana.errors import FloranaError
from florana.lora.factors import Adapter, adapter_from_tensors
from florana.recipe.train_schema import Train
from florana.strategy.base import Pruning
from florana.train.client import diverged, pieces, rows_per_step, steps_per_round, visited
from florana.train.data.tokenize import IGNORED, Example
from florana.train.local_loss import proximal
from florana.train.model import Workbench
from florana.train.optimizer import curve, optimizer_of
from florana.train.own_streams import OwnStreams
from florana.train.pruning import penalty_of
from florana.train.stacked import Present, Stack


@dataclass(frozen=True, eq=False)
class Member:
    """One client of a cohort.

    Args:
        adapter: what it starts from.
        examples: its rows, or bins of them; at least one.
        seed: of the rows' order and of dropout.
        blocks: of its cores those that it trains; None for all.
        pruning: the permission to prune, if any.
        stepped: called after each of its optimizer steps.
    """

    adapter: Adapter
    examples: Sequence[Example]
    seed: int
    blocks: Collection[int] | None = None
    pruning: Pruning | None = None
    stepped: Callable[[], None] = lambda: None


def train_together(
    bench: Workbench,
    members: Sequence[Member],
    settings: Train,
    trains: Collection[str],
    place: tuple[int, int] = (1, 1),
) -> list[tuple[dict[str, Tensor], float] | FloranaError]:
    """Each client's trained tensors and its mean loss, as `train_locally` gives them, within rounding.

    Args:
        bench: the model, with the residual of these clients on it.
        members: the clients, of adapters of equal shapes; where the learning rate has a schedule, of equally many
            steps.
        settings: the recipe's section.
        trains: the kinds of tensors that are trained.
        place: the round's number, from 1, and how many the run has.

    Returns:
        For each client its tensors by the names of `Adapter.tensors`, on the CPU in the dtype they were trained in, and
        its loss; or the error of one whose loss is no longer finite.
    """
    bench.model.train()
    streams = OwnStreams([member.seed for member in members], bench.device)
    present = Present(torch.arange(len(members), device=bench.device), True, streams)
    stack = Stack(bench, [m.adapter for m in members], trains, [m.blocks for m in members], present)
    parameters = stack.trainable
    optimizer = optimizer_of(settings, parameters, stack.second)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = [steps_per_round(settings, len(member.examples)) for member in members]
    factor = curve(settings, max(steps), *place)
    orders = [visited(m.seed, len(m.examples), rows_per_step(settings, len(m.examples))) for m in members]
    terms = [penalty_of(stack.factors(i), m.pruning) for i, m in enumerate(members) if m.pruning is not None]
    if settings.proximal_mu:
        terms.append(proximal(parameters, settings.proximal_mu))
    totals = torch.zeros(len(members), device=bench.device)
    found: dict[int, dict[str, Tensor]] = {}
    with stack.placed(), contextlib.ExitStack() as drawing:
        drawing.enter_context(streams)
        for step in range(max(steps)):
            here = [i for i, count in enumerate(steps) if step < count]
            taken = {i: pieces([members[i].examples[row] for row in next(orders[i])], settings) for i in here}
            for turn in range(max(len(own) for own in taken.values())):
                taking = [i for i in here if turn < len(taken[i])]
                present.clients = torch.tensor(taking, device=bench.device)
                present.all = len(taking) == len(members)
                streams.of(taking)
                own, wanted = losses(bench, [taken[i][turn] for i in taking], settings)
                total: Tensor = wanted.sum()
                for term in terms if turn == 0 else ():
                    total = total + term()
                total.backward()  # type: ignore[no-untyped-call]
                totals.index_add_(0, present.clients, own.detach().to(totals.dtype))
            if settings.max_grad_norm is not None:
                clip_each(parameters, settings.max_grad_norm)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if done := [i for i in here if steps[i] == step + 1]:
                # what later steps make of these, whose rows are gone, is nobody's
                found |= dict(zip(done, _taken(stack, done), strict=True))
            for i in here:
                members[i].stepped()
            if step == 0 and not streams.drawn:
                drawing.close()  # nothing in this model draws: the mode costs time at every call
    means = [total / count for total, count in zip(totals.tolist(), steps, strict=True)]
    return [(found[i], mean) if math.isfinite(mean) else diverged(mean) for i, mean in enumerate(means)]


def adapter_of(trained: dict[str, Tensor], before: Adapter) -> Adapter:
    """What `train_together` gives, in float32 as adapters are kept."""
    return adapter_from_tensors({name: tensor.float() for name, tensor in trained.items()}, before.scalings)


@torch.no_grad()
def clip_each(parameters: Sequence[torch.nn.Parameter], most: float) -> None:
    """Scale each client's gradient down to the norm `most`: g_u min(1, most / (|| g_u || + 1e-6)), as torch does it.

    Args:
        parameters: stacks (clients, ...), all of one client being one gradient.
        most: the norm.

    Examples:
        >>> stack = torch.nn.Parameter(torch.zeros(2, 2))
        >>> stack.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> clip_each([stack], 1.0)
        >>> [[round(value, 3) for value in row] for row in stack.grad.tolist()]
        [[0.6, 0.8], [0.3, 0.4]]
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads])  # (tensors, clients)
    scale = (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, [scale.reshape(-1, *[1] * (grad.ndim - 1)) for grad in grads])


def losses(
    bench: Workbench, batches: Sequence[tuple[Sequence[Example], float]], settings: Train
) -> tuple[Tensor, Tensor]:
    """Of each client its share of the step's loss, the model's own and the one to minimise, both (clients,)."""
    most = max(len(rows) for rows, _ in batches)
    # of each client equally many: a row that fills up counts in no loss
    batch = bench.batch([row for rows, _ in batches for row in (*rows, *[rows[0]] * (most - len(rows)))])
    real = torch.tensor([place < len(rows) for rows, _ in batches for place in range(most)]).to(bench.device)
    shares = torch.tensor([share for _, share in batches], dtype=torch.float64)
    labels = batch.pop("labels")
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=settings.autocast == "bfloat16"):
        logits = bench.forward(batch).logits
    own = loss_each(logits, labels, real, len(batches))
    shares = shares.to(own)
    if not settings.label_smoothing:
        return shares * own, shares * own
    return shares * own, shares * loss_each(logits, labels, real, len(batches), settings.label_smoothing)


def loss_each(logits: Tensor, labels: Tensor, real: Tensor, clients: int, smoothing: float = 0.0) -> Tensor:
    """The mean loss over each client's own predictions, (clients,): what the model's own loss is of its rows alone.

    Args:
        logits: (rows, classes), (rows, 1) of a score, or (rows, time, vocabulary); each client's rows together.
        labels: (rows,) classes or scores, or (rows, time) tokens.
        real: (rows,), false where a row only fills up.
        clients: how many.
        smoothing: of the labels, in cross entropy.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if labels.is_floating_point():
        apart = (logits.squeeze(-1) - labels).square()
        counts = real
    else:
        labels = labels.masked_fill(~(real if labels.ndim == 1 else real[:, None]), IGNORED)
        if labels.ndim == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = F.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=smoothing,
        )
        apart, counts = flat.reshape(labels.shape), labels != IGNORED
    apart = torch.where(counts, apart, 0.0)
    return apart.reshape(clients, -1).sum(1) / counts.reshape(clients, -1).sum(1)


def _taken(stack: Stack, clients: Sequence[int]) -> list[dict[str, Tensor]]:
    """Copies of what those clients have trained, on the CPU."""
    whole = {name: stacked.detach()[list(clients)].cpu() for name, stacked in stack.stacks().items()}
    return [{name: stacked[place].clone() for name, stacked in whole.items()} for place in range(len(clients))]
