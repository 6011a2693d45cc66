"""The server's side: it passes keys and sealed shares on, and takes the masks off a sum, of nobody's part alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from florana.errors import FederationError
from florana.secure import neighbours as graph
from florana.secure import session_keys as keys
from florana.secure import shares
from florana.secure.masks import Numbers, low, mask
from florana.secure.session import Roster, Terms, digest_of, pair_purpose, self_purpose

Revealed = Mapping[str, Mapping[str, bytes]]
"""Client that answers -> owner of a secret -> the share that it holds."""


def routed(sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
    """Holder -> owner -> what the owner sealed for it, from owner -> holder -> the same.

    Examples:
        >>> routed({"a": {"b": b"x"}, "b": {"a": b"y"}})
        {'b': {'a': b'x'}, 'a': {'b': b'y'}}
    """
    found: dict[str, dict[str, bytes]] = {}
    for owner, parts in sealed.items():
        for holder, content in parts.items():
            if holder in sealed:
                found.setdefault(holder, {})[owner] = content
    return found


def opened(
    terms: Terms,
    roster: Roster,
    trip: int,
    present: Sequence[str],
    masked: Mapping[str, Numbers],
    revealed: Revealed,
) -> Numbers:
    """The sum of the survivors' vectors, modulo 2^bits.

        sum_u y_u - sum_{u survives} PRG(b_u) - sum_{v does not} sum_{u survives} (u's mask with v)

    Args:
        terms: of the session.
        roster: everybody's keys.
        trip: which sum.
        present: those that shared out, or survived the trip before.
        masked: survivor -> its masked vector.
        revealed: what the clients revealed of each other's secrets.

    Raises:
        FederationError: fewer survivors than the minimum, or too few shares of a secret.
    """
    if len(masked) < terms.minimum:
        raise FederationError(f"{len(masked)} clients are left, and {terms.minimum} are the fewest of a sum")
    digest, size = digest_of(terms, roster), len(next(iter(masked.values())))
    beside = graph.neighbours(roster, digest)
    total = np.zeros(size, dtype=np.uint32)
    for numbers in masked.values():
        total = total + numbers
    for name in sorted(masked):
        seed = _secret(name, beside, revealed)
        total = total - mask(keys.derived(seed, self_purpose(digest, trip, name)), size, terms.bits)
    for name in sorted(set(present) - masked.keys()):
        near = [other for other in beside[name] if other in masked]
        if not near:
            continue
        private = keys.private_of(_secret(name, beside, revealed))
        if keys.public_of(private) != roster[name].masking[trip]:
            raise FederationError(f"the shares of '{name}' do not give its key", why="a client sent a wrong share")
        for other in near:
            key = keys.agreed(private, roster[other].masking[trip], pair_purpose(digest, trip, name, other))
            numbers = mask(key, size, terms.bits)
            total = total - numbers if other < name else total + numbers
    return np.asarray(total & low(terms.bits), dtype=np.uint32)


def _secret(owner: str, beside: Mapping[str, Sequence[str]], revealed: Revealed) -> bytes:
    holders = sorted((*beside[owner], owner))
    there = {
        place: revealed[holder][owner]
        for place, holder in enumerate(holders)
        if holder in revealed and owner in revealed[holder]
    }
    least = graph.threshold(len(holders))
    if len(there) < least:
        raise FederationError(
            f"{len(there)} of the {len(holders)} clients with shares of '{owner}' answered, and {least} are needed",
            why="the sum stays closed, and nothing of it is known",
        )
    return shares.combined(there, least)
