"""A client in secure sums: what it answers, and what it refuses, whatever the server says.

    keys -> shares -> [masked -> survivors -> reveal] for each trip         (florana.secure.member)

Its secrets are in this process alone: a client that is started anew is missing from the sum. Of one round's training
each trip is opened once: two sums of it over different clients would show the difference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from florana.errors import FloranaError
from florana.federation.entrywise import entrywise
from florana.federation.hidden_part import Hiding, hidden
from florana.federation.messages import Step, question_in
from florana.federation.terms import Sealing
from florana.federation.trip_memory import LOSS, loss_in, update_in, when_in
from florana.secure import member as secure
from florana.secure import wire
from florana.secure.fixed_point import Grid, encoded
from florana.secure.identities import Signer
from florana.secure.masks import Numbers, packed
from florana.secure.member import Member
from florana.secure.session import Terms
from florana.secure.session_keys import Refused
from florana.strategy.base import Named, Sums

Spent = Callable[[str, tuple[int, int, int], str | None], str | None]
"""See `SealedClient`."""

Recall = Callable[[str, int], Named]
"""(run, round) -> what a client keeps after that round."""


class SealedClient:
    """One client's part in secure sums; the one thing that changes is its open session.

    Args:
        who: its name and signatures.
        sealing: as its own recipe has it.
        sums: the strategy's own; None for those that average what is sent entry by entry.
        rows: its training rows.
        spent: (run, (round, attempt, trip)) -> the session in which that sum was opened, or None; with a session, it
            is written down.
        hiding: its own noise, where its recipe has any.
    """

    def __init__(
        self,
        who: Signer,
        sealing: Sealing,
        sums: Sums | None,
        rows: int,
        spent: Spent,
        hiding: Hiding | None = None,
    ) -> None:
        self.hiding = hiding
        self._who, self._sealing, self._sums, self._rows, self._spent = who, sealing, sums, rows, spent
        self._member: Member | None = None

    def answer(self, step: Step, recall: Recall) -> Step:
        """The answer to one step.

        Args:
            step: the server's.
            recall: (run, round) -> what the client keeps after that round, its update among it.

        Raises:
            Refused: the step would tell more than a sum, or was tampered with.
            FloranaError: the update cannot be sent.
        """
        kind = step.head.get("step")
        if kind == "keys":
            return self._keys(wire.terms_from(step.head.get("terms")))
        member = self._member
        if member is None or step.head.get("session") != member.terms.session:
            raise Refused("knows nothing of this session: it was started anew, or another one has begun")
        if kind == "shares":
            self._member, sealed = secure.shared(member, wire.roster_from(step.head.get("roster")), self._who.verify)
            return Step({"sealed": wire.words_to(sealed)})
        trip = wire.number(step.head.get("trip"))
        if kind == "masked":
            return self._masked(member, trip, step, recall(member.terms.run, member.terms.round))
        if kind == "survivors":
            names = wire.names_from(step.head.get("names"))
            self._member, signature = secure.agreed_on(member, trip, names, self._who.sign)
            return Step({"signature": signature.hex()})
        if kind == "reveal":
            signatures = wire.words_from(step.head.get("signatures"))
            after, parts = secure.revealed(member, trip, signatures, self._who.verify)
            self._spend(member.terms, trip)  # on the disk before anything leaves
            self._member = after
            return Step({"shares": wire.words_to(parts)})
        raise Refused("is asked for a step that it does not know")

    def _keys(self, terms: Terms) -> Step:
        own, trips = self._sealing, 1 if self._sums is None else self._sums.trips
        if (terms.bits, terms.most) != (own.bits, own.most) or terms.minimum < own.minimum:
            raise Refused(
                f"the server asks for {terms.bits} bits, {terms.most} rows at most and sums over {terms.minimum}",
                why=f"this client's own recipe says {own.bits}, {own.most} and {own.minimum} or more",
            )
        if not set(terms.trips) <= set(range(trips)):
            raise Refused("is asked for a sum that the strategy of its own recipe does not know")
        if self.hiding is not None:
            self.hiding.require(len(terms.trips))
        if any(self._is_spent(terms, trip) for trip in terms.trips):
            return Step({"spent": True})  # the server was killed as it opened them: another attempt has other updates
        self._member = secure.begun(self._who.name, terms, self._who.sign)
        return Step({"keys": wire.public_to(self._member.public)})

    def _is_spent(self, terms: Terms, trip: int) -> bool:
        return self._spent(terms.run, (terms.round, terms.attempt, trip), None) not in (None, terms.session)

    def _spend(self, terms: Terms, trip: int) -> None:
        if self._is_spent(terms, trip):
            raise Refused(
                f"trip {trip + 1} of round {terms.round} was summed up in another session already",
                why="two sums of the same updates over different clients would show the difference",
            )
        self._spent(terms.run, (terms.round, terms.attempt, trip), terms.session)

    def _masked(self, member: Member, trip: int, step: Step, memory: Named) -> Step:
        terms, head = member.terms, step.head
        if not member.present:
            member = secure.received(member, wire.words_from(head.get("sealed")), wire.names_from(head.get("present")))
        if when_in(memory) != (terms.round, terms.attempt):
            raise FloranaError(f"keeps no update of round {terms.round}: it was started anew since")
        grid = Grid(terms.bits, len(member.roster), terms.most)
        vector = self._vector(grid, trip, step, memory, terms)
        self._member, numbers = secure.masked(member, trip, vector)
        return Step({}, packed(numbers, terms.bits))

    def _vector(self, grid: Grid, trip: int, step: Step, memory: Named, terms: Terms) -> Numbers:
        head, round_ = step.head, terms.round
        scalings = wire.bounds_from(head.get("scalings"))
        both = update_in(memory, scalings)
        if both is None:
            raise FloranaError(f"keeps no update of round {round_}: it was started anew since")
        received, trained = both
        sums = self._sums or entrywise(wire.names_from(head.get("returns")))
        question = question_in(step.payload)
        tensors = sums.measure(trip, round_, question, received, trained)
        before = sums.measure(trip, round_, question, received, received)
        absolute = head.get("absolute") is True
        changes: dict[str, Tensor] = {
            name: tensor.double() if absolute else tensor.double() - before[name].double()
            for name, tensor in tensors.items()
        }
        bounds = wire.bounds_from(head.get("bounds"))
        if bounds.keys() != changes.keys() | ({LOSS} if not trip else set()):
            raise Refused("the bounds are of other tensors than the strategy of its own recipe sends")
        if self.hiding is not None:
            if absolute:
                raise Refused("is asked for a part that is no change, which its noise would not cover")
            draws = self.hiding.begin(round_, terms.attempt, trip)
            changes = hidden(changes, bounds, self.hiding.clip, self.hiding.spread, draws)
        if not trip:
            loss = min(max(loss_in(memory), 0.0), MOST_LOSS) if self._sealing.losses else 0.0
            changes[LOSS] = torch.tensor([loss])
        return encoded(changes, bounds, self._rows, grid)


MOST_LOSS = 100.0
"""A client's mean training loss counts for no more."""


def in_memory() -> Spent:
    """What was opened, of a simulation: it is forgotten with the process."""
    known: dict[tuple[str, tuple[int, int, int]], str] = {}

    def spent(run: str, which: tuple[int, int, int], session: str | None) -> str | None:
        if session is not None:
            known[run, which] = session
        return known.get((run, which))

    return spent
