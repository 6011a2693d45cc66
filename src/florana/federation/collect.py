"""One round's answers: those that were kept when the server ended, and those of the clients that are asked now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from florana.displayable import displayable
from florana.federation.event import Event
from florana.federation.gate import Expected, RejectedUpdate, oversized, validate
from florana.federation.messages import Brief, Engine, Failure, Reply, completed, travelling
from florana.federation.quantize import Format
from florana.federation.spool import Spool
from florana.lora.factors import Update
from florana.strategy.base import Named

REASON = 500
"""Characters of why an update was refused."""


@dataclass(frozen=True, eq=False)
class Gate:
    """How answers are checked and kept.

    Args:
        round: the round that is running.
        clients: who was asked.
        check: (a reply, the clients already let through, how its tensors are written) -> the update; raises
            RejectedUpdate.
        tensors: what is kept of an update.
        put: the update with the kept tensors in their place.
        oversized: client -> why, of updates that are too large beside the others.
    """

    round: int
    clients: Collection[str]
    check: Callable[[Reply, Collection[str], Format], Update]
    tensors: Callable[[Update], Named]
    put: Callable[[Update, Named], Update]
    oversized: Callable[[Sequence[Update]], Mapping[str, str]]


def gate_of(expected: Expected, max_change: float) -> Gate:
    """The gate for clients' updates themselves.

    Args:
        expected: what a proper answer looks like.
        max_change: see `gate.oversized`.
    """

    def check(reply: Reply, seen: Collection[str], form: Format) -> Update:
        return validate(reply, replace(expected, uplink=form), seen)

    def tensors(update: Update) -> Named:
        sent = expected.clients[update.client]
        return travelling(update.adapter, sent.work.up, sent.blocks)

    def put(update: Update, kept: Named) -> Update:
        return replace(update, adapter=completed(update.adapter, kept, expected.clients[update.client].blocks))

    def large(updates: Sequence[Update]) -> Mapping[str, str]:
        return oversized(updates, expected.clients, max_change)

    return Gate(expected.round, expected.clients, check, tensors, put, large)


@dataclass(frozen=True, eq=False)
class Collected:
    """What came of a round's briefs.

    Args:
        updates: those that count, in the order of the clients' names.
        refused: client -> why it does not.
        bytes_up: client -> what it sent, in bytes.
        client_seconds: of the clients' training, summed.
        spent: who of the refused has no privacy budget left.
    """

    updates: Sequence[Update]
    refused: Mapping[str, str]
    bytes_up: Mapping[str, int]
    client_seconds: float
    spent: Collection[str] = ()


def collect(
    engine: Engine, briefs: Sequence[Brief], gate: Gate, spool: Spool, show: Callable[[Event], None]
) -> Collected:
    """Every client's answer through the gate; each update lies on the disk before it counts.

    Args:
        engine: reaches the clients.
        briefs: what they are asked.
        gate: how their answers are checked.
        spool: where updates are kept; clients whose answer is there already are not asked.
        show: told of what happens.

    Raises:
        FederationError: an update could not be written down.
    """
    updates: dict[str, Update] = {}
    refused: dict[str, str] = {}
    spent: set[str] = set()
    bytes_up, seconds = dict.fromkeys(gate.clients, 0), 0.0
    asked = {brief.client: brief for brief in briefs}

    def refuse(client: str, why: str) -> None:
        refused[client] = displayable(why, REASON)
        show(Event("refused", gate.round, client, refused[client]))

    for client, brief in asked.items():
        if (there := spool.kept(brief)) is None:
            continue
        try:
            update = gate.check(there.reply, updates.keys(), "float32")  # however it came
        except RejectedUpdate:
            spool.drop(client)
            continue
        updates[client] = gate.put(update, spool.left(client))
        bytes_up[client], seconds = there.bytes_up, seconds + there.reply.seconds
        if there.memory is not None:
            engine.remember(client, there.memory)
    if updates:
        count = f"{len(updates)} of {len(asked)}"
        show(Event("resumed", gate.round, detail=f"round {gate.round}: {count} clients had answered before"))
    for answer in engine.fit([brief for client, brief in asked.items() if client not in updates]):
        if isinstance(answer, Failure):
            refuse(answer.client, answer.reason)
            spent |= {answer.client} if answer.spent else set()
            continue
        bytes_up[answer.client] = bytes_up.get(answer.client, 0) + len(answer.payload)
        seconds += answer.seconds
        try:
            form = asked[answer.client].uplink if answer.client in asked else "float32"
            update = gate.check(answer, updates.keys(), form)
        except RejectedUpdate as reason:
            # A repeated answer does not undo the first one; the refusal is noted all the same.
            refuse(answer.client, str(reason))
            continue
        memory = engine.memories().get(answer.client)
        kept = spool.keep(asked[answer.client], answer, gate.tensors(update), memory)
        updates[answer.client] = gate.put(update, kept)
        show(Event("reply", gate.round, answer.client))
    for client, why in gate.oversized(list(updates.values())).items():
        del updates[client]
        refuse(client, why)
    for client in set(gate.clients) - updates.keys() - refused.keys():
        refuse(client, "did not answer")
    return Collected([updates[client] for client in sorted(updates)], refused, bytes_up, seconds, spent)
