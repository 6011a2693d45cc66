"""The roll call: who is connected, is each who it says, and do all hold the same recipe and the same base model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import MessageType
from flwr.serverapp import Grid

from florana.errors import FederationError
from florana.federation.loop import Event
from florana.federation.messages import Failure
from florana.flower.engine import exchange
from florana.flower.frames import Frame

Card = Mapping[str, Any]
"""What a site says of itself: see `site.card_of`."""

WANTED = {
    "client",
    "florana",
    "torch",
    "agreed",
    "base",
    "start",
    "holds",
    "labels",
    "base_parameters",
    "adapter",
    "scalings",
}


@dataclass(eq=False)
class Roll:
    """Who takes part. The one thing that changes while a run goes on: nodes come and go.

    Args:
        grid: Flower's connection. keys: client -> its node's public key (bytes), as the operator approved it; None in
            a simulation, where every node says which client it is.
        agreed: the server's recipe, as `site.agreed` gives it.
        deadline: seconds for a site to say who it is (in a simulation it loads the model first).
        show: told of every client that is refused.
    """

    grid: Grid
    keys: Mapping[str, bytes] | None
    agreed: Mapping[str, Any]
    deadline: float
    show: Callable[[Event], None]
    reference: Card | None = None
    cards: dict[str, Card] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    _clients: dict[int, str] = field(default_factory=dict)
    _asked: set[int] = field(default_factory=set)

    def connected(self) -> tuple[dict[str, int], dict[str, str]]:
        """Client -> its node, of those that are online and fit; and why the others that were seen are not."""
        online = self._online()
        new = [node for node in online if node not in self._asked]
        if new:
            self._call(new, online)
        nodes = {self._clients[node]: node for node in online if node in self._clients}
        return nodes, {client: why for client, why in self.refused.items() if client not in nodes}

    def wait(self, enough: int, wanted: int, seconds: float) -> None:
        """Until `wanted` clients are there, or `seconds` have passed and `enough` are.

        Raises:
            FederationError: fewer than `enough` at that time.
        """
        until = time.monotonic() + seconds
        while True:
            nodes, refused = self.connected()
            if len(nodes) >= wanted or (time.monotonic() >= until and len(nodes) >= enough):
                return
            if time.monotonic() >= until:
                reasons = "; ".join(f"{client}: {why}" for client, why in sorted(refused.items()))
                raise FederationError(
                    f"{len(nodes)} clients were there after {seconds:g} seconds, and {enough} are needed",
                    why=reasons or f"connected: {', '.join(sorted(nodes)) or 'nobody'}",
                    fix="start the missing sites with 'florana join', or wait longer",
                )
            time.sleep(0.2)

    def start_of(self, client: str) -> bytes:
        """The adapter before the first round, from a client: for a server without the base model.

        Raises:
            FederationError: the client does not send it.
        """
        node = self.connected()[0][client]
        ((_, answer),) = exchange(
            self.grid, {client: (node, Frame("hello", {"start": True}))}, self.deadline, MessageType.QUERY
        )
        if isinstance(answer, Failure) or answer.kind != "hello":
            why = answer.reason if isinstance(answer, Failure) else str(answer.fields.get("reason", ""))
            raise FederationError(f"client '{client}' did not send the adapter to start from", why=why)
        return answer.payload

    def _online(self) -> dict[int, bytes]:
        return {int(node.node_id): bytes(node.public_key) for node in self.grid.get_nodes()}

    def _call(self, new: list[int], online: Mapping[int, bytes]) -> None:
        names = {bytes_: client for client, bytes_ in (self.keys or {}).items()}
        frames = {str(node): (node, Frame("hello", {})) for node in new}
        for text, answer in sorted(exchange(self.grid, frames, self.deadline, MessageType.QUERY), key=lambda a: a[0]):
            node = int(text)
            known = names.get(online[node]) if self.keys is not None else None
            if self.keys is not None and known is None:
                self._asked.add(node)
                self._refuse(f"node {node}", "its key is none of the approved ones")
                continue
            if isinstance(answer, Failure) or answer.kind != "hello":
                why = answer.reason if isinstance(answer, Failure) else str(answer.fields.get("reason", ""))
                self._refuse(known or f"node {node}", why or "did not say who it is")
                continue  # asked again next time: it may still be loading its model
            self._asked.add(node)
            claimed = str(answer.fields.get("client", ""))
            problem = self._problem(answer.fields, claimed, known)
            if problem:
                self._refuse(known or claimed or f"node {node}", problem)
            else:
                self.reference = self.reference or answer.fields
                self.cards[claimed], self._clients[node] = answer.fields, claimed
                self.refused.pop(claimed, None)
                self.show(Event("joined", 0, claimed, f"{answer.fields['holds']['train']} rows"))

    def _problem(self, card: Card, claimed: str, known: str | None) -> str:
        """Why a site cannot take part; empty where it can."""
        missing = sorted(WANTED - card.keys())
        if missing:
            return f"does not say its {', '.join(missing)} (another version of florana?)"
        if known is not None and claimed != known:
            return f"calls itself '{claimed[:80]}', but its key is that of '{known}'"
        if not _is_count(card["holds"]):
            return "does not say how many rows it holds"
        if known is None and claimed in self._clients.values():
            return f"two nodes call themselves '{claimed[:80]}'"
        different = [
            f"{key} is {card['agreed'].get(key)!r}, here {self.agreed.get(key)!r}"
            for key in sorted(self.agreed.keys() | card["agreed"].keys())
            if card["agreed"].get(key) != self.agreed.get(key)
        ]
        if different:
            return "has another recipe: " + "; ".join(different)[:500]
        for key, what in (("base", "base model"), ("start", "adapter to start from"), ("labels", "classes")):
            if self.reference is not None and card[key] != self.reference[key]:
                first = self.reference["client"]
                return (
                    f"has another {what} than '{first}' (digests {str(card[key])[:12]} and "
                    f"{str(self.reference[key])[:12]}; torch {card['torch']} and {self.reference['torch']})"
                )
        return ""

    def _refuse(self, client: str, reason: str) -> None:
        if self.refused.get(client) != reason:
            self.refused[client] = reason
            self.show(Event("refused", 0, client, reason))


def _is_count(holds: object) -> bool:
    return isinstance(holds, dict) and all(type(holds.get(key)) is int and holds[key] >= 0 for key in ("train", "test"))
