"""What a round brings: clients briefed, their answers through the gate and weighed, as contributions for a step."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from florana.errors import BudgetSpent, FederationError
from florana.federation.collect import Collected, collect, gate_of
from florana.federation.event import Event
from florana.federation.gate import Expected
from florana.federation.messages import Brief, Engine, pack
from florana.federation.sampling import derive
from florana.federation.spool import Spool
from florana.federation.terms import Federation
from florana.federation.weighting import Weighed, weigh
from florana.lora.factors import Contribution, Update
from florana.strategy.base import Payload, State, Strategy

_CARRIED = {"stay": ["A", "B", "core", "extra"], "move": ["extra"]}
"""Kinds of tensors whose rounding a client carries over, by `strategy.facts.Facts.coordinates`."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What came of a round.

    Args:
        parts: for the strategy's step.
        clients: whose updates those are.
        updates: they, with what their clients measured, where the server sees them.
        weights: client -> weight, where it is known.
        refused: client -> why it does not count.
        traffic: client -> {"up", "down"}, in bytes.
        seconds: of the clients' training, summed.
        notes: what the journal says of it.
        truth: the contributions to measure the step against: None where nobody has them.
        metrics: the weighted means of what the clients measured, of what all did.
    """

    parts: Sequence[Contribution]
    clients: Sequence[str]
    updates: Sequence[Update]
    weights: Mapping[str, float]
    refused: Mapping[str, str]
    traffic: Mapping[str, Mapping[str, int]]
    seconds: float
    notes: Mapping[str, object] = field(default_factory=dict)
    truth: Sequence[Contribution] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def mean_metrics(weighed: Weighed) -> dict[str, float]:
    """The weighted means of what all clients measured."""
    shared = set.intersection(*(set(update.metrics) for update in weighed.updates))
    return {
        name: sum(update.metrics[name] * weighed.weights[update.client] for update in weighed.updates)
        for name in sorted(shared)
    }


def gather(
    strategy: Strategy,
    state: State,
    chosen: Sequence[str],
    engine: Engine,
    federation: Federation,
    rows: Mapping[str, int],
    spool: Spool,
    show: Callable[[Event], None],
) -> Gathered:
    """One round's updates.

    Args:
        strategy: the method.
        state: what is broadcast.
        chosen: the clients that are asked.
        engine: reaches them.
        federation: the fixed terms of the run.
        rows: client -> its training rows, as earlier rounds had them.
        spool: where updates are kept.
        show: told of what happens.

    Raises:
        FederationError: fewer usable updates than the minimum.
    """
    payloads = {client: strategy.brief(state, client) for client in chosen}
    briefs = briefs_of(strategy, payloads, state.round + 1, federation)
    expected = expectation(payloads, state.round + 1, rows, federation)
    collected = collect(engine, briefs, gate_of(expected, federation.max_change), spool, show)
    require(collected, len(chosen), state.round + 1, federation.minimum)
    weighed = weigh(collected.updates, payloads, federation.weighing)
    parts = contributions(weighed, payloads)
    return Gathered(
        parts,
        [update.client for update in weighed.updates],
        weighed.updates,
        weighed.weights,
        collected.refused,
        {b.client: {"up": collected.bytes_up[b.client], "down": len(b.payload)} for b in briefs},
        collected.client_seconds,
        weighed.notes,
        parts,
        mean_metrics(weighed),
    )


def contributions(weighed: Weighed, payloads: Mapping[str, Payload]) -> list[Contribution]:
    """The updates as the strategy's step takes them."""
    weights = weighed.weights
    return [
        Contribution(update.client, update.adapter, weights[update.client], sent.residual, sent.blocks)
        for update, sent in ((update, payloads[update.client]) for update in weighed.updates)
    ]


def expectation(
    payloads: Mapping[str, Payload], round_: int, rows: Mapping[str, int], federation: Federation
) -> Expected:
    """What proper answers of a round look like."""
    # read while answers come in: a site that joins during the round is held to the rows it said
    known: Mapping[str, int] = ChainMap(federation.examples, rows)  # type: ignore[arg-type]
    return Expected(round_, payloads, known, federation.uplink, federation.reach)


def require(collected: Collected, asked: int, round_: int, minimum: int) -> None:
    """Raise FederationError where fewer updates can be used than the minimum; BudgetSpent where budgets are why."""
    if len(collected.updates) < max(1, minimum):
        reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(collected.refused.items()))
        kind = BudgetSpent if collected.spent else FederationError
        raise kind(
            f"round {round_} has {len(collected.updates)} usable updates of {asked} clients asked, "
            f"and needs {max(1, minimum)}",
            why=reasons or "no client answered",
            fix="mend the clients named and run again with --resume: the rounds before this one are committed",
        )


def briefs_of(strategy: Strategy, payloads: Mapping[str, Payload], round_: int, federation: Federation) -> list[Brief]:
    """What each client is asked first.

    Args:
        strategy: the method.
        payloads: client -> what it is sent.
        round_: the round's number.
        federation: the fixed terms of the run.
    """
    packed: dict[tuple[int, int, int], bytes] = {}  # clients that get the same objects get the same bytes
    briefs = []
    for client, payload in payloads.items():
        key = (id(payload.adapter), id(payload.residual), id(payload.question) if payload.question else 0)
        if key not in packed:
            packed[key] = pack(payload.adapter, payload.work.down, payload.residual, question=payload.question)
        carries = "move" if strategy.sums is not None else strategy.facts.coordinates
        briefs.append(
            Brief(
                round=round_,
                client=client,
                seed=derive(federation.seed, "client", round_, client),
                payload=packed[key],
                evaluate=federation.personal(round_),
                trains=sorted(payload.work.trains),
                returns=sorted(payload.work.up),
                scalings=payload.adapter.scalings,
                blocks=payload.blocks,
                pruning=payload.pruning,
                uplink=federation.uplink,
                feedback=[] if federation.uplink == "float32" else _CARRIED[carries],
                trip=None if strategy.sums is None else 0,
            )
        )
    return briefs
