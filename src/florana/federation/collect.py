"""One round's answers: those that were kept when the server ended, and those of the clients that are asked now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from florana.displayable import displayable
from florana.federation.event import Event
from florana.federation.gate import Expected, RejectedUpdate, oversized, validate
from florana.federation.messages import Brief, Engine, Failure
from florana.federation.spool import Spool
from florana.lora.factors import Update

REASON = 500
"""Characters of why an update was refused."""


@dataclass(frozen=True, eq=False)
class Collected:
    """What came of a round's briefs.

    Args:
        updates: those that count.
        refused: client -> why it does not.
        bytes_up: client -> what it sent, in bytes.
        client_seconds: of the clients' training, summed.
    """

    updates: Sequence[Update]
    refused: Mapping[str, str]
    bytes_up: Mapping[str, int]
    client_seconds: float


def collect(
    engine: Engine,
    briefs: Sequence[Brief],
    expected: Expected,
    spool: Spool,
    max_change: float,
    show: Callable[[Event], None],
) -> Collected:
    """Every client's answer through the gate; each update lies on the disk before it counts.

    Args:
        engine: reaches the clients.
        briefs: what they are asked.
        expected: what a proper answer looks like.
        spool: where updates are kept; clients whose answer is there already are not asked.
        max_change: see `gate.oversized`.
        show: told of what happens.

    Raises:
        FederationError: an update could not be written down.
    """
    updates: dict[str, Update] = {}
    refused: dict[str, str] = {}
    bytes_up, seconds = dict.fromkeys(expected.clients, 0), 0.0
    asked = {brief.client: brief for brief in briefs}

    def refuse(client: str, why: str) -> None:
        refused[client] = displayable(why, REASON)
        show(Event("refused", expected.round, client, refused[client]))

    for client, brief in asked.items():
        if (there := spool.kept(brief)) is None:
            continue
        try:
            # what was kept is float32, however it came
            update = validate(there.reply, replace(expected, uplink="float32"), updates.keys())
        except RejectedUpdate:
            spool.drop(client)
            continue
        updates[client] = spool.left(expected.clients[client], update)
        bytes_up[client], seconds = there.bytes_up, seconds + there.reply.seconds
        if there.memory is not None:
            engine.remember(client, there.memory)
    if updates:
        count = f"{len(updates)} of {len(asked)}"
        show(Event("resumed", expected.round, detail=f"round {expected.round}: {count} clients had answered before"))
    for answer in engine.fit([brief for client, brief in asked.items() if client not in updates]):
        if isinstance(answer, Failure):
            refuse(answer.client, answer.reason)
            continue
        bytes_up[answer.client] = bytes_up.get(answer.client, 0) + len(answer.payload)
        seconds += answer.seconds
        try:
            update = validate(answer, expected, updates.keys())
        except RejectedUpdate as reason:
            # A repeated answer does not undo the first one; the refusal is noted all the same.
            refuse(answer.client, str(reason))
            continue
        sent, memory = expected.clients[answer.client], engine.memories().get(answer.client)
        updates[answer.client] = spool.keep(asked[answer.client], sent, answer, update, memory)
        show(Event("reply", expected.round, answer.client))
    for client, why in oversized(list(updates.values()), expected.clients, max_change).items():
        del updates[client]
        refuse(client, why)
    for client in expected.clients.keys() - updates.keys() - refused.keys():
        refuse(client, "did not answer")
    return Collected(list(updates.values()), refused, bytes_up, seconds)
