"""A session of secure sums without a network: members, a server, and what may go wrong between them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from florana.secure import member as secure
from florana.secure import opening
from florana.secure.identities import made_up
from florana.secure.masks import Numbers, packed
from florana.secure.member import Member
from florana.secure.session import Public, Terms

BITS = 20
STEPS = ("keys", "shares", "masked", "survivors", "reveal")


def terms(trips: int = 1, minimum: int = 3, session: str = "one") -> Terms:
    return Terms(session, "run", 1, 0, tuple(range(trips)), BITS, 100, minimum)


def vectors(names: Collection[str], size: int, seed: int = 0) -> dict[str, Numbers]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 2**BITS, size).astype(np.uint32) for name in sorted(names)}


def summed(parts: Mapping[str, Numbers], names: Collection[str]) -> Numbers:
    total = sum((parts[name].astype(np.int64) for name in names), np.zeros(len(next(iter(parts.values()))), np.int64))
    return np.asarray(total % 2**BITS, dtype=np.uint32)


@dataclass
class Session:
    """The parties, up to any step."""

    names: list[str]
    terms: Terms
    members: dict[str, Member] = field(default_factory=dict)
    roster: dict[str, Public] = field(default_factory=dict)
    present: list[str] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.who = made_up(self.names)
        self.drawn = itertools.count()

    def draw(self, size: int) -> bytes:
        """Bytes that are the same in every run of a test, so that what is random is not so by chance."""
        return hashlib.sha256(f"{self.terms.session} {next(self.drawn)}".encode()).digest()[:size]

    def begin(self, gone: Mapping[str, Collection[str]] = {}) -> None:
        """Keys and shares; `gone`: step -> who leaves before answering it."""
        for name in self.names:
            if name not in gone.get("keys", ()):
                self.members[name] = secure.begun(name, self.terms, self.who[name].sign, self.draw)
        self.roster = {name: member.public for name, member in self.members.items()}
        sealed = {}
        for name in list(self.members):
            if name in gone.get("shares", ()):
                continue
            after, sealed[name] = secure.shared(self.members[name], self.roster, self.who[name].verify, self.draw)
            self.members[name] = after
        self.present = sorted(sealed)
        self.seen += [part for parts in sealed.values() for part in parts.values()]
        routed = opening.routed(sealed)
        for name in self.present:
            self.members[name] = secure.received(self.members[name], routed.get(name, {}), self.present)

    def trip(
        self,
        number: int,
        given: Mapping[str, Numbers],
        gone: Mapping[str, Collection[str]] = {},
        change: Callable[[dict[str, Numbers]], None] = lambda masked: None,
    ) -> tuple[Numbers, list[str]]:
        """One sum, and whose it is."""
        masked = {}
        for name in self.present:
            if name not in gone.get("masked", ()) and name in self.members:
                self.members[name], masked[name] = secure.masked(self.members[name], number, given[name])
        self.seen += [packed(numbers, BITS) for numbers in masked.values()]
        change(masked)
        survivors = sorted(masked)
        signatures = {}
        for name in survivors:
            if name not in gone.get("survivors", ()):
                after, signatures[name] = secure.agreed_on(self.members[name], number, survivors, self.who[name].sign)
                self.members[name] = after
        revealed = {}
        for name in signatures:
            if name not in gone.get("reveal", ()):
                after, revealed[name] = secure.revealed(self.members[name], number, signatures, self.who[name].verify)
                self.members[name] = after
        total = opening.opened(self.terms, self.roster, number, self.present, masked, revealed)
        for step in ("masked", "survivors", "reveal"):
            for name in gone.get(step, ()):
                self.members.pop(name, None)
        self.present = survivors
        return total, survivors
