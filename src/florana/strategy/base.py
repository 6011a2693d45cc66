"""What a strategy is: a value of three pure functions over an explicit, frozen state.

    init(adapter) -> State            before the first round
    brief(state, client) -> Payload   what goes down to one client
    step(state, parts) -> Outcome     the accepted updates, weighted, in; the next state out

Nothing is kept on the strategy. The round loop owns sampling, the gate, the journal and the accounting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from florana.factors import Adapter, Contribution


@dataclass(frozen=True, eq=False)
class State:
    """Everything the federation knows after a round.

    Args:
        round: rounds committed so far.
        adapter: the pair the clients train on from next round's start, and the averaged extra tensors.
        residual: a frozen part in factored form that every client adds to its model, or None.
        memory: a strategy's own tensors, by name.
    """

    round: int
    adapter: Adapter
    residual: Adapter | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Payload:
    """What the server sends to one client: where to start, and what to add unchanged."""

    adapter: Adapter
    residual: Adapter | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """The next state, and what the step has to say of itself (numbers and lists of numbers, for the journal)."""

    state: State
    notes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Strategy:
    """One published method.

    Args:
        name: as recipes and tables spell it.
        source: paper and equation.
        init, brief, step: the three functions above.
    """

    name: str
    source: str
    init: Callable[[Adapter], State]
    brief: Callable[[State, str], Payload]
    step: Callable[[State, Sequence[Contribution]], Outcome]


def start(adapter: Adapter) -> State:
    """The usual `init`: the initial adapter, nothing else."""
    return State(round=0, adapter=adapter)


def broadcast(state: State, client: str) -> Payload:
    """The usual `brief`: every client gets the same adapter, and the residual where there is one."""
    del client
    return Payload(state.adapter, state.residual)


def advance(state: State, adapter: Adapter, residual: Adapter | None = None) -> State:
    """The state after one more round."""
    return State(state.round + 1, adapter, residual, state.memory)
