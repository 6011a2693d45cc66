"""Registration: who is connected, is each who it says, and do all hold the same recipe and the same base model."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import MessageType

from florana.displayable import displayable
from florana.errors import FederationError
from florana.federation.collect import REASON
from florana.federation.event import Event
from florana.federation.messages import Failure
from florana.flower.app.flower_engine import Nodes, Seat, exchange
from florana.flower.app.frames import Frame
from florana.flower.app.site_card import Card, Common, card_from, difference, digest, most_common

SAYS = 30.0
"""Seconds for a site to say who it is: its model is loaded."""
ANEW = 10.0
"""Seconds until a site that did not fit is asked once more: it may have been repaired."""


@dataclass(eq=False)
class Registration:
    """Who takes part. The one thing that changes while a run goes on: nodes come and go.

    Args:
        grid: the connection to the nodes.
        keys: client -> its node's public key (bytes), as the operator approved it; None in a simulation, where every
            node says which client it is.
        agreed: the server's recipe, as `site.agreed` gives it; with `threads`, where it names their number.
        own: what the server itself holds; None without the base model, where the majority of the sites decides at the
            end of `wait`.
        deadline: seconds of a round; in a simulation also those to say who it is, since it loads the model first.
        show: told of every client that joins or is refused.
        began: client -> what it computed with when the run began, of a run that goes on.
        rows: client -> its training rows, as the operator approved them or as this run began with; of the others the
            first card counts, for the whole run.
        cards: client -> its card, of all whose name and recipe are right.
        examples: client -> its training rows.
        refused: client -> why it does not take part.
    """

    grid: Nodes
    keys: Mapping[str, bytes] | None
    agreed: Mapping[str, Any]
    own: Common | None
    deadline: float
    show: Callable[[Event], None]
    began: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    cards: dict[str, Card] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    _settled: tuple[Common, str] | None = None
    _clients: dict[int, str] = field(default_factory=dict)
    _again: dict[int, float] = field(default_factory=dict)
    """Node -> the time before which it is not asked who it is."""

    def __post_init__(self) -> None:
        if self.own is not None:
            self._settled = self.own, "the server"

    def connected(self) -> tuple[dict[str, Seat], dict[str, str]]:
        """Client -> its seat, of those that are online and fit; and why the others that were seen are not."""
        nodes = self._look(self.deadline)
        seats = {client: Seat(node, digest(self.cards[client])) for client, node in nodes.items()}
        return seats, {client: why for client, why in self.refused.items() if client not in nodes}

    def doubt(self, client: str) -> None:
        """Ask a client anew before the next round: it is not what it said."""
        for node in [node for node, name in self._clients.items() if name == client]:
            self._forget(node)

    def wait(self, enough: int, wanted: int, seconds: float) -> None:
        """Until `wanted` clients are there, or `seconds` have passed and `enough` are.

        Raises:
            FederationError: fewer than `enough` at that time.
        """
        until = time.monotonic() + seconds
        while True:
            nodes = self._look(max(until - time.monotonic(), 1.0))
            if len(nodes) >= wanted or time.monotonic() >= until:
                self._settle()
                if len(nodes) >= min(wanted, enough):
                    return
                reasons = "; ".join(f"{client}: {why}" for client, why in sorted(self.refused.items()))
                raise FederationError(
                    f"{len(nodes)} clients were there after {seconds:g} seconds, and {enough} are needed",
                    why=reasons or f"connected: {', '.join(sorted(nodes)) or 'nobody'}",
                    fix="start the missing sites with 'florana join', or wait longer",
                )
            time.sleep(0.2)

    @property
    def common(self) -> Common:
        """What all have that take part, after `wait`."""
        assert self._settled is not None
        return self._settled[0]

    def start(self) -> bytes:
        """The adapter before the first round, from a client: for a server without the base model.

        Raises:
            FederationError: no client sends the one whose digest all have.
        """
        seats, reasons = self.connected()[0], []
        for client, seat in sorted(seats.items()):
            asked = {client: (seat.node, Frame("hello", {"start": True}))}
            ((_, answer),) = exchange(self.grid, asked, self.deadline, MessageType.QUERY)
            if isinstance(answer, Failure) or answer.kind != "hello":
                reasons.append(f"{client}: {_reason(answer)}")
            elif hashlib.sha256(answer.payload).hexdigest() != self.common.start:
                reasons.append(f"{client}: sent another one than it said")
            else:
                return answer.payload
        raise FederationError("no client sent the adapter to start from", why="; ".join(reasons) or "none is connected")

    def _look(self, seconds: float) -> dict[str, int]:
        """Ask the new nodes who they are, for so long at most; the clients that fit, with their nodes."""
        online = {int(node.node_id): bytes(node.public_key) for node in self.grid.get_nodes()}
        for node in self._again.keys() - online.keys():  # what comes back may be another
            self._forget(node)
        now = time.monotonic()
        new = {node: key for node, key in online.items() if self._again.get(node, 0.0) <= now}
        if new:
            self._call(new, seconds if self.keys is None else min(seconds, SAYS))
        nodes = {self._clients[node]: node for node in online if node in self._clients}
        reference = self._settled or self._most()
        return {client: node for client, node in nodes.items() if self._fits(client, reference)}

    def _forget(self, node: int) -> None:
        self._again.pop(node, None)
        self._clients.pop(node, None)

    def _most(self) -> tuple[Common, str] | None:
        card = most_common(list(self.cards.values()))
        return None if card is None else (card.common, f"'{card.client}'")

    def _settle(self) -> None:
        self._settled = self._settled or self._most()
        for client in self.cards:
            self._fits(client, self._settled)

    def _fits(self, client: str, reference: tuple[Common, str] | None) -> bool:
        problem = difference(self.cards[client].common, *reference) if reference else ""
        if problem and reference is self._settled:  # before that the majority may still change
            self._refuse(client, f"{problem}; its torch is {self.cards[client].torch[:20]}")
        return not problem

    def _call(self, new: Mapping[int, bytes], seconds: float) -> None:
        known = self._known(new)
        frames = {str(node): (node, Frame("hello", {})) for node in known}
        for text, answer in sorted(exchange(self.grid, frames, seconds, MessageType.QUERY), key=lambda a: a[0]):
            node = int(text)
            name = known[node]
            self._again[node] = time.monotonic() + ANEW
            if isinstance(answer, Failure) or answer.kind != "hello":
                self._refuse(name or f"node {node}", _reason(answer))
                continue
            card = card_from(answer.fields)
            problem = card if isinstance(card, str) else self._problem(card, name)
            if isinstance(card, str) or problem:
                claimed = "" if isinstance(card, str) else card.client[:80]
                self._refuse(name or claimed or f"node {node}", problem)
                continue
            back = card.client in self.cards
            self.cards[card.client] = card
            if card.holds.train is not None:
                self.examples[card.client] = card.holds.train
            self._clients[node], self._again[node] = card.client, math.inf
            self.refused.pop(card.client, None)
            if self._fits(card.client, self._settled):
                detail = card.introduced(self.began.get(card.client))
                self.show(Event("back" if back else "joined", 0, card.client, detail))

    def _known(self, new: Mapping[int, bytes]) -> dict[int, str]:
        """The new nodes whose keys are approved, with their names; in a simulation all, and no names."""
        if self.keys is None:
            return dict.fromkeys(new, "")
        names = {key: client for client, key in self.keys.items()}
        for node in new.keys() - {node for node, key in new.items() if key in names}:
            self._again[node] = math.inf
            self._refuse(f"node {node}", "its key is none of the approved ones")
        return {node: names[key] for node, key in new.items() if key in names}

    def _problem(self, card: Card, known: str) -> str:
        """Why a site cannot take part, whatever the others have; empty where it can."""
        if known and card.client != known:
            return f"calls itself '{card.client[:80]}', but its key is that of '{known}'"
        if not known and card.client in self._clients.values():
            return f"two nodes call themselves '{card.client[:80]}'"
        said, known_rows = card.holds.train, self.rows.get(card.client, self.examples.get(card.client))
        if said is not None and known_rows is not None and said != known_rows:
            return (
                f"says it has {said} training rows, and {known_rows} were approved or counted before; a new count "
                f"needs 'florana flower approve FED NAME.pub --rows NAME={said}' and a restart"
            )
        theirs = {**card.agreed, **({"threads": card.threads} if "threads" in self.agreed else {})}
        different = [
            f"{key} is {theirs.get(key)!r}, here {self.agreed.get(key)!r}"
            for key in sorted(self.agreed.keys() | theirs.keys())
            if theirs.get(key) != self.agreed.get(key)
        ]
        return "has another recipe: " + "; ".join(different)[:500] if different else ""

    def _refuse(self, client: str, reason: str) -> None:
        client, reason = displayable(client, 100), displayable(reason, REASON)
        if self.refused.get(client) != reason:
            self.refused[client] = reason
            self.show(Event("refused", 0, client, reason))


def _reason(answer: Frame | Failure) -> str:
    """Why a site did not say who it is."""
    said = answer.reason if isinstance(answer, Failure) else str(answer.fields.get("reason", ""))[:500]
    return displayable(said, REASON) or "did not say who it is"
