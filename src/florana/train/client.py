"""A client's round: take the server's adapter, train it on the own rows, send it back. Seeded, without own state."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from florana.aggregate.heterogeneous import leading
from florana.errors import FloranaError
from florana.federation import trip_memory
from florana.federation.error_feedback import outgoing, uplink_error
from florana.federation.messages import Brief, Reply, unpack
from florana.lora.factors import Adapter, kind_of
from florana.recipe import schema as r
from florana.strategy.base import Sums
from florana.train.client_clip import clipped
from florana.train.data.tokenize import Example
from florana.train.evaluate import evaluate
from florana.train.local_loss import predictions, proximal, smoothed
from florana.train.model import Workbench
from florana.train.neftune import noisy_embeddings
from florana.train.optimizer import curve, optimizer_of
from florana.train.pruning import penalty_of, shrunk


@dataclass(frozen=True, eq=False)
class ClientData:
    """What one client holds.

    Args:
        train: its rows to train on.
        test: its local test split; may be empty.
        bins: the rows to train on as they go through the model, several in one where they are packed.
    """

    train: Sequence[Example]
    test: Sequence[Example]
    bins: Sequence[Example]


@dataclass(eq=False)
class TrainingClients:
    """All clients of a simulation at one bench; `fit` is what the local engine calls.

    Args:
        bench: the shared model.
        first: the adapter before the first round, head included, as every client knows it.
        data: client -> its rows.
        common: the common test set clients are measured on.
        train: the recipe's section.
        evaluate: the recipe's section.
        head: the recipe's policy for tensors trained whole.
        rounds: of the whole run, which a schedule may span.
        step: called after every optimizer step, for progress.
        sums: what the strategy asks for in the place of the update, where it does.
        clip: what an update is cut to, see `client_clip`; None leaves it.
    """

    bench: Workbench
    first: Adapter
    data: Mapping[str, ClientData]
    common: Sequence[Example]
    train: r.Train
    evaluate: r.Evaluate
    head: str
    rounds: int = 1
    step: Callable[[str], None] = lambda client: None
    sums: Sums | None = None
    clip: float | None = None
    _last: tuple[Brief, tuple[Adapter, Adapter | None]] | None = field(default=None, repr=False)

    def fit(self, brief: Brief, memory: Mapping[str, Tensor]) -> tuple[Reply, Mapping[str, Tensor]]:
        """One round of one client: the reply, and what it keeps (what it trains and does not send; remainders)."""
        started = time.perf_counter()
        if brief.trip:  # it has trained
            found, rows = trip_memory.measured(brief, self.sums, memory), len(self.data[brief.client].train)
            seconds = time.perf_counter() - started
            return Reply(brief.client, brief.round, rows, found.metrics, found.content, seconds), memory
        sent = self.received(brief, memory)
        self.bench.load(*sent, brief.trains, brief.blocks)
        term = penalty_of(self.bench.factors, brief.pruning) if brief.pruning is not None else None
        place = (brief.round, self.rounds)
        stepped = functools.partial(self.step, brief.client)
        loss = train_locally(self.bench, self.data[brief.client].bins, self.train, brief.seed, stepped, term, place)
        return self.answer(brief, memory, sent, self.bench.adapter(), loss, time.perf_counter() - started)

    def received(self, brief: Brief, memory: Mapping[str, Tensor]) -> tuple[Adapter, Adapter | None]:
        """The adapter to train, and the residual: what was sent, completed by what the client kept."""
        return self._unpacked(brief, trip_memory.own(memory))

    def answer(
        self,
        brief: Brief,
        memory: Mapping[str, Tensor],
        received: tuple[Adapter, Adapter | None],
        trained: Adapter,
        loss: float,
        seconds: float,
    ) -> tuple[Reply, Mapping[str, Tensor]]:
        """The reply of a client that has trained, and what it keeps.

        Args:
            brief: what it was asked.
            memory: what it kept before.
            received: the adapter before training, and the residual.
            trained: the adapter after training.
            loss: of the training.
            seconds: of the training.
        """
        own, (adapter, residual) = self.data[brief.client], received
        if brief.pruning is not None and shrunk(adapter, trained, brief.pruning):
            trained = leading(trained, brief.pruning.rank)
        if self.clip is not None:
            trained = clipped(trained, adapter, self.clip)
        metrics = {"train_loss": loss}
        if brief.evaluate:
            self.bench.load(trained, residual, brief.trains, brief.blocks)  # what is measured is what is sent
            for figure, rows in (("personal", own.test), ("clients_on_common", self.common)):
                if rows:
                    scores = evaluate(self.bench, rows, self.evaluate.batch_size)
                    metrics |= {f"{figure}/{name}": value for name, value in scores.items()}
        stays = set(brief.trains) - set(brief.returns) | ({"extra"} if self.head == "personal" else set())
        kept = {name: tensor for name, tensor in trained.tensors().items() if kind_of(name) in stays}
        sent = Adapter(trained.modules, {} if "extra" in stays else trained.extra, trained.cores)
        if brief.trip is not None:
            kept |= trip_memory.update_of(adapter, sent, loss, (brief.round, brief.attempt))
            if brief.sealed:  # not even its rows are said
                return Reply(brief.client, brief.round, 1, {}, b"", seconds), kept
            found = trip_memory.measured(brief, self.sums, {**memory, **kept})
            reply = Reply(
                brief.client, brief.round, len(own.train), {**metrics, **found.metrics}, found.content, seconds
            )
            return reply, {**kept, **found.feedback}
        out = outgoing(sent, adapter, brief, memory)
        if brief.uplink != "float32":
            metrics["uplink_error"] = uplink_error(out.arrives, sent, adapter)
        reply = Reply(brief.client, brief.round, len(own.train), metrics, out.content, seconds)
        return reply, kept | dict(out.feedback)

    def _unpacked(self, brief: Brief, own: Mapping[str, Tensor]) -> tuple[Adapter, Adapter | None]:
        """One broadcast is decoded once for all clients that keep nothing of their own."""
        if own or self._last is None or self._last[0].payload is not brief.payload:
            unpacked = unpack(brief.payload, self.first, own, brief.scalings)
            if own:
                return unpacked
            self._last = (brief, unpacked)
        return self._last[1]


def train_locally(
    bench: Workbench,
    examples: Sequence[Example],
    settings: r.Train,
    seed: int,
    stepped: Callable[[], None],
    term: Callable[[], Tensor] | None = None,
    place: tuple[int, int] = (1, 1),
) -> float:
    """The recipe's optimizer on the bench's adapter for the wanted steps or epochs; returns the mean loss.

    Rows are visited in passes of a seeded random order; dropout and noise draw from the same seed. The loss that is
    returned is the model's own, a mean over the steps.

    Args:
        bench: the model, with the adapter to train.
        examples: the client's rows, or bins of them.
        settings: the recipe's section.
        seed: of the rows' order and of dropout.
        stepped: called after every optimizer step.
        term: added to what is minimised, not to the loss that is reported.
        place: the round's number, from 1, and how many the run has.

    Raises:
        FloranaError: the loss is no longer finite.
    """
    require_rows(examples)
    bench.model.train()
    parameters = bench.trainable
    optimizer = optimizer_of(settings, parameters, [pair.B for pair in bench.factors.values()])
    rates = [group["lr"] for group in optimizer.param_groups]
    together = rows_per_step(settings, len(examples))
    steps = steps_per_round(settings, len(examples))
    factor = curve(settings, steps, *place)
    terms = [term] if term is not None else []
    if settings.proximal_mu:
        terms.append(proximal(parameters, settings.proximal_mu))
    order = visited(seed, len(examples), together)
    total = torch.zeros((), device=bench.device)
    devices = [bench.device] if bench.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), noisy_embeddings(bench, settings):
        torch.manual_seed(seed)
        for step in range(steps):
            total += _backward(bench, [examples[row] for row in next(order)], settings, terms)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step)
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stepped()
    mean = float(total) / steps
    if not math.isfinite(mean):
        raise diverged(mean)
    return mean


def diverged(loss: float) -> FloranaError:
    """What is said of a client whose loss is no longer finite."""
    return FloranaError(f"the training loss became {loss}", fix="lower train.learning_rate")


def require_rows(examples: Sequence[Example]) -> None:
    """Raise FloranaError where a client has nothing to train on."""
    if not examples:
        raise FloranaError("there are no training rows", fix="lower partition.holdout, or give the client rows")


def steps_per_round(settings: r.Train, rows: int) -> int:
    """Optimizer steps of a client with that many rows."""
    if settings.steps is not None:
        return settings.steps
    return (settings.epochs or 1) * math.ceil(rows / rows_per_step(settings, rows))


def rows_per_step(settings: r.Train, rows: int) -> int:
    """Rows of one optimizer step of a client with that many rows."""
    return min(settings.batch_size * settings.gradient_accumulation_steps, rows)


def visited(seed: int, rows: int, together: int) -> Iterator[list[int]]:
    """The rows of one step after the other: passes of a random order, each cut into steps, without end.

    Args:
        seed: of the orders.
        rows: how many the client has.
        together: rows of a step; the last one of a pass may have fewer.

    Examples:
        >>> steps = visited(0, 3, 2)
        >>> [len(next(steps)) for _ in range(4)]
        [2, 1, 2, 1]
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(rows).tolist()
        for start in range(0, rows, together):
            yield order[start : start + together]


def pieces(examples: Sequence[Example], settings: r.Train) -> list[tuple[Sequence[Example], float]]:
    """The batches of one step, each with its share of the step's predictions; one without any is left out.

    Args:
        examples: the rows of the step.
        settings: the recipe's section.

    Examples:
        >>> rows = [Example((1, 2, 3), (), (-100, 2, 3)), Example((1, 2), (), (-100, 2))]
        >>> [(len(batch), round(share, 2)) for batch, share in pieces(rows, r.Train(steps=1, batch_size=1))]
        [(1, 0.67), (1, 0.33)]
    """
    size = settings.batch_size
    batches = [examples[at : at + size] for at in range(0, len(examples), size)]
    if len(batches) > 1:
        batches = [batch for batch in batches if predictions(batch)] or batches[:1]
    counts = [1] if len(batches) == 1 else [predictions(batch) for batch in batches]
    return [(batch, count / sum(counts)) for batch, count in zip(batches, counts, strict=True)]


def _backward(
    bench: Workbench, examples: Sequence[Example], settings: r.Train, terms: Sequence[Callable[[], Tensor]]
) -> Tensor:
    """The gradient of one step, batch by batch, as one batch of all its rows gives it; returns the model's own loss."""
    loss = torch.zeros((), device=bench.device)
    for number, (rows, share) in enumerate(pieces(examples, settings)):
        batch = bench.batch(rows)
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=settings.autocast == "bfloat16"):
            output = bench.forward(batch)
        own = output.loss
        if settings.label_smoothing:
            own = smoothed(output, batch["labels"], settings.label_smoothing)
        wanted = own if share == 1 else share * own
        for term in terms if number == 0 else ():
            wanted = wanted + term()
        wanted.backward()
        loss += (output.loss if share == 1 else share * output.loss).detach()
    return loss
