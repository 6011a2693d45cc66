"""What all parties of a session agree on, and the public part of each: the roster that signatures and masks rest on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

Sign = Callable[[bytes], bytes]
"""A client's own signature of some bytes."""

Verify = Callable[[str, bytes, bytes], bool]
"""(client, bytes, signature) -> whether the signature is that client's, of those bytes."""


@dataclass(frozen=True)
class Terms:
    """One session.

    Args:
        session: a word that no other session has.
        run: the run that it belongs to.
        round: the round.
        attempt: which one of that round, from 0: each has updates of its own.
        trips: the sums that are formed in it, by number.
        bits: of each number of a vector.
        most: the most rows that one client counts for.
        minimum: the fewest clients over which a sum is opened.
    """

    session: str
    run: str
    round: int
    attempt: int
    trips: tuple[int, ...]
    bits: int
    most: int
    minimum: int

    def digest(self) -> str:
        """sha256 of all of it."""
        return _digest(asdict(self))


@dataclass(frozen=True)
class Public:
    """What a client shows of itself in a session.

    Args:
        sealing: the public key by which others seal shares for it.
        masking: trip -> the public key from which its masks with others are agreed.
        signature: its own, of `statement`.
    """

    sealing: bytes
    masking: Mapping[int, bytes]
    signature: bytes = b""

    def statement(self, terms: Terms, name: str) -> bytes:
        """What the signature is of: the session, the name and the keys."""
        keys = {"sealing": self.sealing.hex(), "masking": {str(t): key.hex() for t, key in self.masking.items()}}
        return f"florana secure sums: keys {_digest([terms.digest(), name, keys])}".encode()


Roster = Mapping[str, Public]
"""Client -> what it shows, of all that take part."""


def digest_of(terms: Terms, roster: Roster) -> str:
    """sha256 of the terms and of everybody's statement."""
    return _digest([terms.digest(), {name: public.statement(terms, name).decode() for name, public in roster.items()}])


def survivors_statement(roster_digest: str, trip: int, survivors: Sequence[str]) -> bytes:
    """What a client signs of a list of survivors."""
    return f"florana secure sums: survivors {_digest([roster_digest, trip, sorted(survivors)])}".encode()


def pair_purpose(roster_digest: str, trip: int, one: str, other: str) -> str:
    """What a mask of two clients is derived for; the same for both."""
    return f"mask {_digest([roster_digest, trip, sorted([one, other])])}"


def share_purpose(roster_digest: str, owner: str, holder: str) -> str:
    """What the sealing of one client's shares for another is derived for."""
    return f"shares {_digest([roster_digest, owner, holder])}"


def self_purpose(roster_digest: str, trip: int, name: str) -> str:
    """What a client's own mask is derived for."""
    return f"self {_digest([roster_digest, trip, name])}"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
