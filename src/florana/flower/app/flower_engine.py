"""The engine that reaches clients through Flower's Grid: one message per brief, answers until a deadline."""

from __future__ import annotations

import hashlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from torch import Tensor

from florana.federation.messages import Brief, Failure, Reply, Step
from florana.flower.app.codec import brief_frame, read_reply, read_sealed, sealed_frame
from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame

POLL_SECONDS = 0.05

PATIENCE = 60.0
"""Seconds of one step of a secure sum, at most: a site has nothing to do in it that takes long."""

PLAIN = {
    ErrorCode.MESSAGE_UNAVAILABLE: "was not reached before the time was over",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "did not answer before the time was over",
    ErrorCode.NODE_UNAVAILABLE: "left, or was not heard of any more",
}
"""What Flower's numbers mean for a person who waits for a site."""


class Nodes(Protocol):
    """The connection to the nodes: `link.Link`, or the Grid that Flower gives to an exported app."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Those that are online."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send requests; the id of each, empty where it was not taken."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to these requests that have come."""
        ...


@dataclass(frozen=True)
class Seat:
    """Where a client is reached, and the digest of what it said of itself at registration (`site_card.digest`)."""

    node: int
    card: str


Note = Callable[..., None]
"""Given an event and facts about it by name: what an audit log writes down."""


def unnoted(event: str, **facts: object) -> None:
    """Nothing is written down: a simulation."""


def size_and_digest(payload: bytes) -> dict[str, object]:
    """What an audit log says of bytes."""
    return {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


@dataclass(frozen=True, eq=False)
class FlowerEngine:
    """Carries briefs over a Grid.

    Args:
        grid: the connection to the nodes.
        seats: asked at the start of each round: client -> its seat, of the clients that are connected and fit; and
            client -> why not, of the others.
        changed: told of a client that is not what it said at registration.
        run: the name of the run, under which clients keep their client state.
        deadline: seconds from sending to the last answer that counts.
        note: told what each site was asked and answered (see `Note`).
    """

    grid: Nodes
    seats: Callable[[], tuple[Mapping[str, Seat], Mapping[str, str]]]
    changed: Callable[[str], None]
    run: str
    deadline: float
    note: Note = unnoted

    def memories(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Nothing: the client state lies with the clients, see `federation.client_state`."""
        return {}

    def remember(self, client: str, memory: Mapping[str, Tensor]) -> None:
        """Nothing: as `memories`."""

    def fit(self, briefs: Sequence[Brief]) -> Iterator[Reply | Failure]:
        """Every client's answer as it comes; after the deadline, a Failure for each that is missing."""
        seats, absent = self.seats()
        asked = [brief for brief in briefs if brief.client in seats]
        for brief in briefs:
            if brief.client not in seats:
                yield Failure(brief.client, absent.get(brief.client, "is not connected"))
        nonces = {brief.client: secrets.token_hex(16) for brief in asked}
        frames = {b.client: (seats[b.client].node, self._frame(b, seats, nonces)) for b in asked}
        for brief in asked:
            self.note("asked", site=brief.client, round=brief.round, run=self.run, **size_and_digest(brief.payload))
        for client, answer in exchange(self.grid, frames, self.deadline):
            if isinstance(answer, Frame):
                self.note("answered", site=client, kind=answer.kind, **size_and_digest(answer.payload))
            if isinstance(answer, Frame) and answer.kind == "changed":
                self.changed(client)
            yield answer if isinstance(answer, Failure) else read_reply(answer, client, nonces[client])

    def exchange(self, steps: Mapping[str, Step]) -> Iterator[tuple[str, Step | Failure]]:
        """Every site's answer to a step of a secure sum; after a minute at most, a Failure for each missing."""
        seats, absent = self.seats()
        for client in steps.keys() - seats.keys():
            yield client, Failure(client, absent.get(client, "is not connected"))
        nonces = {client: secrets.token_hex(16) for client in steps if client in seats}
        frames = {
            client: (seats[client].node, sealed_frame(steps[client], self.run, nonce, seats[client].card))
            for client, nonce in nonces.items()
        }
        for client in nonces:
            said = {name: steps[client].head[name] for name in ("step", "trip") if name in steps[client].head}
            self.note("asked", site=client, run=self.run, **said, **size_and_digest(steps[client].payload))
        for client, answer in exchange(self.grid, frames, min(self.deadline, PATIENCE)):
            if isinstance(answer, Frame):
                self.note("answered", site=client, kind=answer.kind, **size_and_digest(answer.payload))
            yield client, answer if isinstance(answer, Failure) else read_sealed(answer, client, nonces[client])

    def _frame(self, brief: Brief, seats: Mapping[str, Seat], nonces: Mapping[str, str]) -> Frame:
        return brief_frame(brief, self.run, nonces[brief.client], seats[brief.client].card)


def exchange(
    grid: Nodes, frames: Mapping[str, tuple[int, Frame]], deadline: float, kind: str = MessageType.TRAIN
) -> Iterator[tuple[str, Frame | Failure]]:
    """Send each client its frame; yield each client's answer once, in the order of arrival.

    Args:
        grid: the connection to the nodes.
        frames: client -> its node's id and what it is sent.
        deadline: seconds; clients that have not answered by then are a Failure.
        kind: Flower's type of the message.
    """
    clients = list(frames)
    until = time.monotonic() + deadline
    messages = [
        Message(to_record(frame), dst_node_id=node, message_type=kind, ttl=deadline + 60)
        for node, frame in frames.values()
    ]
    identities = list(grid.push_messages(messages)) if messages else []
    identities += [""] * (len(clients) - len(identities))
    waiting = {client: identity for client, identity in zip(clients, identities, strict=True) if identity}
    for client in clients:
        if client not in waiting:
            yield client, Failure(client, "is not connected any more")
    arrived: queue.SimpleQueue[tuple[str, Frame | Failure | Exception]] = queue.SimpleQueue()
    done, pause = threading.Event(), max(POLL_SECONDS, 0.01 * len(waiting))
    # a thread for each: Flower waits for the rest of an answer that was begun, and one site must not hold up the others
    for client, identity in waiting.items():
        threading.Thread(target=_wait, args=(grid, client, identity, done, pause, arrived), daemon=True).start()
    try:
        while waiting:
            client, answer = arrived.get(timeout=max(until - time.monotonic(), 0.0))
            if isinstance(answer, Exception):
                raise answer
            del waiting[client]
            yield client, replace(answer, client=client) if isinstance(answer, Failure) else answer
    except queue.Empty:
        for client in waiting:
            yield client, Failure(client, f"did not answer within {deadline:g} seconds")
    finally:
        done.set()


def _wait(
    grid: Nodes,
    client: str,
    identity: str,
    done: threading.Event,
    pause: float,
    arrived: queue.SimpleQueue[tuple[str, Frame | Failure | Exception]],
) -> None:
    while not done.is_set():
        try:
            answers = [m for m in grid.pull_messages([identity]) if m.metadata.reply_to_message_id == identity]
        except Exception as error:
            if _is_unreachable(error):
                arrived.put((client, error))
            else:
                why = f"sent a message that cannot be decoded ({type(error).__name__})"
                arrived.put((client, Failure(client, why)))
            return
        if answers:  # an answer to nothing that is asked now is no answer
            arrived.put((client, _frame_of(answers[0])))
            return
        done.wait(pause)


def _frame_of(message: Any) -> Frame | Failure:
    if message.has_error():
        reason = " ".join(str(message.error.reason or "").split())
        known = PLAIN.get(message.error.code)
        return Failure("", known or f"Flower reports error {message.error.code} for it: {reason[:300]}")
    try:
        return from_record(message.content)
    except (ValueError, TypeError, KeyError) as error:
        return Failure("", f"sent {error}" if isinstance(error, ValueError) else "sent a damaged message")


def _is_unreachable(error: Exception) -> bool:
    """The SuperLink itself is gone: no client's fault."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpcore") or isinstance(error, OSError)
