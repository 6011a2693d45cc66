"""What a strategy is: a value of three pure functions over an explicit, frozen state, and the facts of the method.

    init(adapter) -> State            before the first round
    brief(state, client) -> Payload   what goes down to one client, what it trains, what comes back
    step(state, parts) -> Outcome     the accepted updates, weighted, in; the next state out

Nothing is kept on the strategy. The round loop owns sampling, the gate, the journal and the accounting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from florana.aggregate.factorization import revive
from florana.lora.factors import Adapter, Contribution
from florana.strategy.facts import Facts

MARK = "mark/"
"""Before the names of a state's memory that say how it was begun, and nothing of the adapter."""


@dataclass(frozen=True, eq=False)
class State:
    """Everything the federation knows after a round.

    Args:
        round: rounds committed so far.
        adapter: the LoRA factors the clients train on from next round's start, and the averaged extra tensors.
        residual: a frozen part in factored form that every client adds to its model, or None.
        memory: a strategy's own tensors, by name.
    """

    round: int
    adapter: Adapter
    residual: Adapter | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Which kinds of tensors (`A`, `B`, `core`, `scale`) a client trains, sends up and is sent.

    Extra tensors (heads) are not meant here: they follow the recipe's head policy. `scale` is one factor per block of
    a core; it is multiplied into the core before it is sent.

    Args:
        trains: kinds that the client trains; what is trained and not sent up stays with the client.
        up: kinds that it sends.
        down: kinds that it is sent.
    """

    trains: frozenset[str]
    up: frozenset[str]
    down: frozenset[str]


def work(trains: Sequence[str], up: Sequence[str], down: Sequence[str]) -> Work:
    """A Work from three lists.

    Examples:
        >>> sorted(work(["B"], up=["B"], down=["B"]).trains)
        ['B']
    """
    return Work(frozenset(trains), frozenset(up), frozenset(down))


PAIR = work(["A", "B"], up=["A", "B"], down=["A", "B"])
"""Both factors trained, both sent both ways."""


@dataclass(frozen=True)
class Pruning:
    """One client's permission to prune: to lower its rank after training to `rank` and to no other.

    Its loss gets `penalty` times the size of what lies beyond that rank (`aggregate.pad.tail`); where training made
    that smaller, it answers with the first `rank` columns of B and rows of A, in every module.
    """

    rank: int
    penalty: float


@dataclass(frozen=True, eq=False)
class Payload:
    """What the server sends to one client: where to start, what to add unchanged, and what to do.

    Args:
        adapter: complete, as the server knows it; of it, `work.down` travels and the client holds the rest.
        residual: the frozen part to add unchanged.
        work: what to train and send.
        blocks: the blocks of its cores that the client trains and sends, in any order (None: all); all of them go down.
        pruning: the permission to prune, where the client has it.
        question: what goes along for the first of the `Sums`.
    """

    adapter: Adapter
    residual: Adapter | None = None
    work: Work = PAIR
    blocks: tuple[int, ...] | None = None
    pruning: Pruning | None = None
    question: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step ends with.

    Args:
        state: the next state.
        notes: what the step has to say of itself (numbers and lists of numbers, for the journal).
        judged: (the contributions, the state) that the aggregation error is measured between, where a server optimizer
            moved on from them; None: those that were given, and `state`.
    """

    state: State
    notes: Mapping[str, object] = field(default_factory=dict)
    judged: tuple[Sequence[Contribution], State] | None = None


Named = Mapping[str, Tensor]
"""Tensors by name."""


Allowed = Callable[[str], Tensor]
"""The name of a tensor, as in `Adapter.tensors` -> the most that training can move each of its numbers."""


@dataclass(frozen=True)
class Sums:
    """How a method gets on with sums over the clients alone: one after the other, each in a trip of its own.

    The clients train once, before the first trip, and keep their update until the last. A trip's sum is a weighted mean
    over those who answered it.

    Args:
        trips: how many sums a round takes.
        ask: (what was sent, the means so far) -> what goes down before the next trip; empty before the first, whose
            part is `Payload.question`.
        measure: (trip from 0, round, what came down, the adapter as received, as trained) -> what a client sends: each
            tensor linear in the client's product, or in the tensors that it trained whole.
        mean: (the adapter as sent, all means) -> the clients' mean as one adapter, for `Strategy.step`; of any rank.
        bounds: (trip, round, what came down, the adapter as received, how far training can move its numbers) -> the
            most by which each tensor that is sent can differ from an untrained client's.
    """

    trips: int
    ask: Callable[[Adapter, Sequence[Named]], Named]
    measure: Callable[[int, int, Named, Adapter, Adapter], Named]
    mean: Callable[[Adapter, Sequence[Named]], Adapter]
    bounds: Callable[[int, int, Named, Adapter, Allowed], dict[str, float]]


Cut = Callable[[Payload, int, float], Payload]
"""(the broadcast, a client's rank, its scaling) -> what a client of that rank gets of it."""


@dataclass(frozen=True)
class Strategy:
    """One published method.

    Args:
        name: as recipes and tables spell it.
        source: paper and equation.
        facts: what is trained and sent, and what the method can be combined with.
        init: the first state, from the initial adapter.
        brief: what one client is sent.
        step: the next state, from the clients' contributions.
        cut: how a client of a lower rank gets its part; None where all clients must have one rank.
        begin: what `init` is given: PEFT's usual start (`lora`), or factors from the singular vectors of each base
            weight (`principal`) or of its first gradient (`gradient`).
        sums: what it asks clients for in the place of their factors; None: the factors.
    """

    name: str
    source: str
    facts: Facts
    init: Callable[[Adapter], State]
    brief: Callable[[State, str], Payload]
    step: Callable[[State, Sequence[Contribution]], Outcome]
    cut: Cut | None = None
    begin: Literal["lora", "principal", "gradient"] = "lora"
    sums: Sums | None = None


def start(adapter: Adapter) -> State:
    """The usual `init`: the initial adapter, nothing else."""
    return State(round=0, adapter=adapter)


def sending(what: Work) -> Callable[[State, str], Payload]:
    """The `brief` of methods in which every client gets the same adapter, residual and work."""

    def brief(state: State, client: str) -> Payload:
        del client
        return Payload(state.adapter, state.residual, what)

    return brief


broadcast = sending(PAIR)
"""The usual `brief`: both factors, to be trained and sent back."""


def advance(state: State, adapter: Adapter, residual: Adapter | None = None) -> State:
    """The state after one more round; components of the adapter that no gradient could reach are made trainable
    again."""
    return State(state.round + 1, revive(adapter, state.adapter), residual, state.memory)


def ranks_of(adapter: Adapter) -> dict[str, int]:
    """Module name -> its rank."""
    return {name: pair.rank for name, pair in adapter.modules.items()}


def rank_of(adapter: Adapter) -> int:
    """The rank of the adapter's modules (the largest, where they differ)."""
    return max(pair.rank for pair in adapter.modules.values())
