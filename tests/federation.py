"""A federation without models, for tests of the loop: clients that answer with seeded noise on what they were sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from florana.adapters.adapter_folder import AdapterCard
from florana.federation.event import Event
from florana.federation.journal import Journal
from florana.federation.loop import run_rounds
from florana.federation.messages import Brief, Failure, Reply, pack, unpack
from florana.federation.terms import Federation
from florana.federation.trip_memory import measured, update_of
from florana.federation.weighting import Weighing, by_examples
from florana.lora.factors import Adapter, LoraFactors, adapter_from_tensors, kind_of
from florana.strategy import STRATEGIES
from florana.strategy.base import State, Strategy

CARD = AdapterCard("base", "SEQ_CLS", ("q",), ("head",))
CLIENTS = [f"client-{u}" for u in range(5)]


def first_adapter() -> Adapter:
    """Two non-square modules of rank 2 with scaling 1.5, and a head; B is zero, as PEFT starts it."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: LoraFactors(B=torch.zeros(out, 2), A=torch.randn(2, into, generator=generator), scaling=1.5)
        for name, (out, into) in {"layer.0.q": (6, 9), "layer.1.q": (8, 5)}.items()
    }
    return Adapter(modules, {"head.weight": torch.zeros(3, 4)})


VARIANTS = {
    "best-rank from sums": {"name": "best-rank", "source": "sums"},
    "hetlora pruning": {"name": "hetlora", "gamma": 0.5, "penalty": 0.1},
    "ravan one head": {"name": "ravan", "heads": 2, "size": 2, "heads_per_client": 1},
}
"""Strategies whose options change what travels, by a name of their own."""


def built(strategy: str) -> Strategy:
    """The strategy or variant of that name, small enough for the modules of `first_adapter`."""
    options = dict(VARIANTS.get(strategy, {"name": strategy}))
    if strategy == "ravan":
        options |= {"heads": 2, "size": 2}
    return STRATEGIES[str(options.pop("name"))](**options)


_KEPT: dict[tuple[str, int], Mapping[str, Tensor]] = {}
"""(client, seed of its round) -> the update that it measures again in later trips."""


def noisy(brief: Brief, strategy: str = "fedit") -> Reply:
    """What a client answers: what it was asked to train of what it was sent, plus noise of its own seed."""
    examples = 10 * (1 + int(brief.client[-1]))
    if brief.trip:
        content = measured(brief, built(strategy).sums, _KEPT[brief.client, brief.seed]).content
        return Reply(brief.client, brief.round, examples, {}, content, 0.01)
    first = built(strategy).init(first_adapter()).adapter
    adapter, _ = unpack(brief.payload, first, {}, brief.scalings)
    generator = torch.Generator().manual_seed(brief.seed)
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if kind_of(name) in brief.trains else tensor
        for name, tensor in adapter.tensors().items()
    }
    moved |= {name: tensor + 1 for name, tensor in moved.items() if kind_of(name) == "extra"}
    answer = adapter_from_tensors(moved, brief.scalings)
    metrics = {"train_loss": 1.0 + int(brief.client[-1])}
    if brief.trip is not None:
        _KEPT[brief.client, brief.seed] = update_of(adapter, answer)
        content = measured(brief, built(strategy).sums, _KEPT[brief.client, brief.seed]).content
        return Reply(brief.client, brief.round, examples, metrics, content, 0.01)
    return Reply(brief.client, brief.round, examples, metrics, pack(answer, brief.returns, blocks=brief.blocks), 0.01)


class FakeEngine:
    """Answers each brief by a function; keeps a counter per client as its memory."""

    def __init__(
        self,
        answer: Callable[[Brief], Sequence[Reply | Failure]] = lambda brief: [noisy(brief)],
        memories: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.answer = answer
        self._memories = dict(memories or {})

    def fit(self, briefs: Sequence[Brief]) -> Iterator[Reply | Failure]:
        for brief in briefs:
            seen = self._memories.get(brief.client, {}).get("rounds", torch.zeros(1))
            self._memories[brief.client] = {"rounds": seen + 1}
            yield from self.answer(brief)

    def memories(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self._memories

    def remember(self, client: str, memory: Mapping[str, Tensor]) -> None:
        self._memories[client] = memory


def federation(rounds: int, minimum: int = 1) -> Federation:
    return Federation(
        clients=CLIENTS,
        rounds=rounds,
        per_round=3,
        seed=7,
        weighing=Weighing(by_examples),
        evaluate=None,
        measured=lambda round_: True,
        personal=lambda round_: False,
        minimum=minimum,
    )


def run(
    folder: Path,
    strategy: str,
    rounds: int,
    answer: Callable[[Brief], Sequence[Reply | Failure]] | None = None,
    minimum: int = 1,
    show: Callable[[Event], None] = lambda event: None,
) -> State:
    """Run, or continue, a fake federation in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, CARD)
    last, _ = journal.recover()
    chosen = built(strategy)
    state = last.state if last else chosen.init(first_adapter())
    engine = FakeEngine(answer or (lambda brief: [noisy(brief, strategy)]), last.memories if last else None)
    return run_rounds(chosen, state, engine, federation(rounds, minimum), journal, show)
