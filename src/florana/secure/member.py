"""A client's side of a session: Bonawitz et al. 2017, "Practical Secure Aggregation", against an active server.

    begun      -> Public           fresh keys, signed by the client's own key
    shared     -> sealed shares    of each trip's two secrets, for its neighbours
    masked     -> y_u              x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   (modulo 2^bits)
    agreed_on  -> signature        of one list of survivors per trip, never of two
    revealed   -> shares           of b_v for survivors, of the masking seed for the others: never both of one client

Pure functions over a frozen state; whoever calls them keeps the state in memory alone. What a client must not do, it
refuses (`session_keys.Refused`), and the state stays as it was.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from florana.secure import neighbours as graph
from florana.secure import session_keys as keys
from florana.secure import shares
from florana.secure.masks import Numbers, low, mask
from florana.secure.session import (
    Public,
    Roster,
    Sign,
    Terms,
    Verify,
    digest_of,
    pair_purpose,
    self_purpose,
    share_purpose,
    survivors_statement,
)
from florana.secure.session_keys import SEED, Refused


@dataclass(frozen=True, eq=False)
class Member:
    """What a client knows in a session. Nothing of it is ever written down.

    Args:
        name: the client's.
        terms: of the session.
        public: what it showed.
        sealing: the seed of its sealing key.
        masking: trip -> the seed of its masking key.
        roster: everybody's keys, once they are known.
        own: trip -> the seed b of its own mask.
        held: owner -> trip -> (its share of the owner's b, of the owner's masking seed).
        present: those that have shared out, once they are known; in later trips those that survived.
        sent: trips whose masked vector it has given: two under one mask would show their difference.
        signed: trip -> the survivors that it has signed.
        told: trips whose shares it has revealed.
        before: of those, who was present until then.
    """

    name: str
    terms: Terms
    public: Public
    sealing: bytes = field(repr=False)
    masking: Mapping[int, bytes] = field(repr=False)
    roster: Roster = field(default_factory=dict)
    own: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    held: Mapping[str, Mapping[int, tuple[bytes, bytes]]] = field(default_factory=dict, repr=False)
    present: tuple[str, ...] = ()
    sent: frozenset[int] = frozenset()
    signed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    told: frozenset[int] = frozenset()
    before: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """Of the terms and the roster."""
        return digest_of(self.terms, self.roster)

    @functools.cached_property
    def neighbours(self) -> Mapping[str, tuple[str, ...]]:
        """Client -> its neighbours."""
        return graph.neighbours(self.roster, self.digest)

    @property
    def holders(self) -> tuple[str, ...]:
        """Who holds shares of this client's secrets: its neighbours and itself, sorted."""
        return tuple(sorted((*self.neighbours[self.name], self.name)))


def begun(name: str, terms: Terms, sign: Sign, draw: Callable[[int], bytes] = secrets.token_bytes) -> Member:
    """Fresh keys for a session.

    Args:
        name: the client's.
        terms: of the session.
        sign: its own signature.
        draw: so many random bytes.
    """
    sealing, masking = draw(SEED), {trip: draw(SEED) for trip in terms.trips}
    unsigned = Public(
        keys.public_of(keys.private_of(sealing)),
        {trip: keys.public_of(keys.private_of(seed)) for trip, seed in masking.items()},
    )
    public = replace(unsigned, signature=sign(unsigned.statement(terms, name)))
    return Member(name, terms, public, sealing, masking)


def shared(
    member: Member, roster: Roster, verify: Verify, draw: Callable[[int], bytes] = secrets.token_bytes
) -> tuple[Member, dict[str, bytes]]:
    """The shares of this client's secrets, sealed for each neighbour; neighbour -> what goes to it.

    Args:
        member: as it began.
        roster: everybody's keys, as the server tells them.
        verify: the signatures of the clients that this one knows.
        draw: so many random bytes.

    Raises:
        Refused: fewer clients than the minimum, a key that its client has not signed, this client's own changed.
    """
    if member.roster:
        raise Refused("was told another roster already in this session")
    if len(roster) < member.terms.minimum:
        raise Refused(f"the roster has {len(roster)} clients, and {member.terms.minimum} are the fewest of a sum")
    if roster.get(member.name) != member.public:
        raise Refused("this client's own keys are not on the roster as it sent them")
    for name, public in roster.items():
        if set(public.masking) != set(member.terms.trips):
            raise Refused(f"'{name}' has keys for other sums than the session's")
        if not verify(name, public.statement(member.terms, name), public.signature):
            raise Refused(
                f"the keys said to be of '{name}' are not signed by it",
                why="a server that puts its own keys in a client's place could read what that client sends",
            )
    every = [key for public in roster.values() for key in (public.sealing, *public.masking.values())]
    if len(set(every)) != len(every):
        raise Refused("a key stands twice on the roster")
    own = {trip: draw(SEED) for trip in member.terms.trips}
    known = replace(member, roster=dict(roster), own=own)
    holders, least = known.holders, graph.threshold(len(known.holders))
    parts = {
        trip: (shares.split(own[trip], len(holders), least), shares.split(seed, len(holders), least))
        for trip, seed in known.masking.items()
    }
    sealed = {}
    for place, holder in enumerate(holders):
        pairs = {trip: (b[place], s[place]) for trip, (b, s) in parts.items()}
        if holder == known.name:
            known = replace(known, held={holder: pairs})
            continue
        content = b"".join(part for trip in sorted(pairs) for part in pairs[trip])
        sealed[holder] = keys.sealed(
            _sealing_key(known, known.name, holder, holder), content, share_purpose(known.digest, known.name, holder)
        )
    return known, sealed


def _sealing_key(member: Member, owner: str, holder: str, other: str) -> bytes:
    purpose = share_purpose(member.digest, owner, holder)
    return keys.agreed(keys.private_of(member.sealing), member.roster[other].sealing, purpose)


def received(member: Member, sealed: Mapping[str, bytes], present: Sequence[str]) -> Member:
    """The member with its neighbours' shares.

    Args:
        member: after `shared`.
        sealed: neighbour -> what it sealed for this client.
        present: all that shared out.

    Raises:
        Refused: too few are present, or a neighbour's share is missing or was changed.
    """
    if member.present:
        raise Refused("was told already who takes part in this session")
    names = _list(member, present, tuple(member.roster))
    here = [name for name in member.neighbours[member.name] if name in names]
    if len(here) + 1 < graph.threshold(len(member.holders)):
        raise Refused("too few neighbours take part for a share to be put together again")
    held = dict(member.held)
    for owner in here:
        if owner not in sealed:
            raise Refused(f"the share of '{owner}' is missing")
        purpose = share_purpose(member.digest, owner, member.name)
        content = keys.opened(_sealing_key(member, owner, member.name, owner), sealed[owner], purpose)
        if len(content) != 2 * SEED * len(member.terms.trips):
            raise Refused(f"the share of '{owner}' has another size")
        parts = [content[at : at + SEED] for at in range(0, len(content), SEED)]
        held[owner] = {trip: (parts[2 * n], parts[2 * n + 1]) for n, trip in enumerate(sorted(member.terms.trips))}
    return replace(member, held=held, present=names)


def masked(member: Member, trip: int, vector: Numbers) -> tuple[Member, Numbers]:
    """The vector under the client's own mask and those it shares with each neighbour that is present.

    Args:
        member: after `received`; in later trips after `agreed_on`.
        trip: which sum.
        vector: modulo 2^bits.

    Raises:
        Refused: the trip is none of the session's, or an earlier one is not yet done.
    """
    if trip not in member.terms.trips or not member.present:
        raise Refused(f"trip {trip + 1} is none that this session can sum up now")
    if any(before < trip and before not in member.told for before in member.terms.trips):
        raise Refused(f"trip {trip + 1} is asked for before the ones before it are done")
    if trip in member.sent:
        raise Refused(f"trip {trip + 1} is asked for a second time: two vectors under one mask show their difference")
    bits = member.terms.bits
    own = keys.derived(member.own[trip], self_purpose(member.digest, trip, member.name))
    total = vector + mask(own, len(vector), bits)
    for other in member.neighbours[member.name]:
        if other in member.present:
            total = total + signed_mask(member, member.masking[trip], member.name, other, trip, len(vector))
    return replace(member, sent=member.sent | {trip}), np.asarray(total & low(bits), dtype=np.uint32)


def signed_mask(member: Member, seed: bytes, name: str, other: str, trip: int, count: int) -> Numbers:
    """What `name` adds for its pair with `other`, from its masking seed: the two add up to nothing."""
    purpose = pair_purpose(member.digest, trip, name, other)
    key = keys.agreed(keys.private_of(seed), member.roster[other].masking[trip], purpose)
    numbers = mask(key, count, member.terms.bits)
    return numbers if name < other else (np.uint32(0) - numbers)


def agreed_on(member: Member, trip: int, survivors: Sequence[str], sign: Sign) -> tuple[Member, bytes]:
    """The signature of a trip's survivors.

    Args:
        member: after `masked`.
        trip: which sum.
        survivors: whose masked vectors the server has.
        sign: the client's own signature.

    Raises:
        Refused: another list than one signed before, too few, or one that does not fit.
    """
    if trip not in member.sent:
        raise Refused(f"is shown survivors of trip {trip + 1}, to which it gave nothing")
    names = member.signed[trip] if trip in member.told else _list(member, survivors, member.present)
    if trip in member.told and names != tuple(sorted(set(survivors))):
        raise Refused(f"is shown two lists of survivors of trip {trip + 1}")
    if trip in member.signed and member.signed[trip] != names:
        raise Refused(f"is shown two lists of survivors of trip {trip + 1}")
    signature = sign(survivors_statement(member.digest, trip, names))
    return replace(member, signed={**member.signed, trip: names}), signature


def revealed(
    member: Member, trip: int, signatures: Mapping[str, bytes], verify: Verify
) -> tuple[Member, dict[str, bytes]]:
    """The shares that open a trip's sum: of a survivor's own mask, of another's masking seed.

    The same ones, however often they are asked for.

    Args:
        member: after `agreed_on`.
        trip: which sum.
        signatures: client -> its signature of the survivors.
        verify: the signatures of the clients that this one knows.

    Raises:
        Refused: too few of those that hold this client's secrets have signed the same list.
    """
    if trip not in member.signed:
        raise Refused(f"the shares of trip {trip + 1} are asked for before a list of survivors was signed")
    names = member.signed[trip]
    statement = survivors_statement(member.digest, trip, names)
    agreeing = [
        name
        for name in member.holders
        if name in names and name in signatures and verify(name, statement, signatures[name])
    ]
    least = graph.threshold(len(member.holders))
    if len(agreeing) < least:
        raise Refused(
            f"{len(agreeing)} clients signed the survivors of trip {trip + 1}, and {least} are needed",
            why="a server that shows clients different lists could open a single client's part",
        )
    there = member.before.get(trip, member.present)
    parts = {o: pairs[trip][0 if o in names else 1] for o, pairs in member.held.items() if o in there}
    before = {**member.before, trip: there}
    return replace(member, told=member.told | {trip}, present=names, before=before), parts


def _list(member: Member, names: Sequence[str], among: Sequence[str]) -> tuple[str, ...]:
    """The names, sorted, if they may be those of a sum."""
    found = tuple(sorted(set(names)))
    if not set(found) <= set(among) or member.name not in found:
        raise Refused("the list names others than those that were there before, or not this client")
    if len(found) < member.terms.minimum:
        raise Refused(f"the list has {len(found)} clients, and {member.terms.minimum} are the fewest of a sum")
    return found
