"""Secure sums without a network: the sum is exact, dropouts at any step, and what a hostile server is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from florana.errors import FederationError, FloranaError
from florana.secure import member as secure
from florana.secure import neighbours, opening, session_keys, shares, wire
from florana.secure.fixed_point import Grid, count, decoded, encoded
from florana.secure.masks import mask, packed, packed_size, unpacked
from florana.secure.member import Member
from florana.secure.session import Public, share_purpose, survivors_statement
from florana.secure.session_keys import Refused
from tests.secure_cases import BITS, STEPS, Session, summed, terms, vectors


def session(clients: int, trips: int = 1, minimum: int = 3) -> Session:
    return Session([f"site-{n:03}" for n in range(clients)], terms(trips, minimum))


@given(st.integers(3, 7), st.integers(1, 40), st.integers(0, 10**6), st.integers(1, 2))
def test_the_sum_is_that_of_the_vectors_bit_for_bit(clients: int, size: int, seed: int, trips: int) -> None:
    one = session(clients, trips)
    one.begin()
    for trip in range(trips):
        parts = vectors(one.names, size, seed + trip)
        total, survivors = one.trip(trip, parts)
        assert survivors == one.names
        assert np.array_equal(total, summed(parts, one.names))


@pytest.mark.parametrize(("step", "trip"), [*((step, 0) for step in STEPS), *((step, 1) for step in STEPS[2:])])
def test_who_leaves_at_any_step_costs_nobody_the_sum(step: str, trip: int) -> None:
    """Of six, two leave: four are the threshold. A part that was sent counts, though its client left after it."""
    one, gone = session(6, 2), {step: ["site-001", "site-004"]}
    one.begin(gone)
    parts = [vectors(one.names, 9, seed) for seed in (1, 2)]
    for number in (0, 1):
        total, survivors = one.trip(number, parts[number], gone if number == trip else {})
        assert np.array_equal(total, summed(parts[number], survivors))
        left = (step in ("keys", "shares", "masked") and number == trip) or number > trip or step in ("keys", "shares")
        assert survivors == [n for n in one.names if not (left and n in gone[step])]


@pytest.mark.parametrize("step", ["masked", "survivors", "reveal"])
def test_above_the_threshold_there_is_no_sum(step: str) -> None:
    one = session(6, minimum=2)
    one.begin()
    with pytest.raises(FederationError, match=r"needed|fewest"):
        one.trip(0, vectors(one.names, 5), {step: one.names[:3]})


def test_the_server_itself_opens_nothing_below_the_minimum_or_the_threshold() -> None:
    """By its own count, whatever the clients signed: of six, five are the fewest and four shares open a secret."""
    one = session(6, minimum=5)
    one.begin()
    given = vectors(one.names, 5)
    masked = {}
    for name in one.names:
        one.members[name], masked[name] = secure.masked(one.members[name], 0, given[name])
    four = {name: masked[name] for name in one.names[:4]}
    with pytest.raises(FederationError, match=r"^4 clients are left, and 5 are the fewest"):
        opening.opened(one.terms, one.roster, 0, one.present, four, {})
    with pytest.raises(FederationError, match=r"^0 of the 6 clients with shares of 'site-000' answered"):
        opening.opened(one.terms, one.roster, 0, one.present, masked, {})


def test_a_member_masks_nothing_that_too_few_neighbours_could_open() -> None:
    """Of six with a minimum of two: three are enough for a list, and too few for the four shares of a secret."""
    with pytest.raises(Refused, match="too few neighbours take part"):
        session(6, minimum=2).begin({"shares": ["site-003", "site-004", "site-005"]})
    session(6, minimum=2).begin({"shares": ["site-004", "site-005"]})


def test_many_clients_mask_with_some_of_the_others_only() -> None:
    one = session(60, minimum=30)
    one.begin()
    degrees = {len(near) for near in one.members[one.names[0]].neighbours.values()}
    assert degrees == {32}
    for name, near in one.members[one.names[0]].neighbours.items():
        assert all(name in one.members[other].neighbours[other] for other in near)
    parts = vectors(one.names, 6)
    total, survivors = one.trip(0, parts, {"masked": one.names[:8]})
    assert len(survivors) == 52
    assert np.array_equal(total, summed(parts, survivors))


def test_what_the_server_has_of_one_client_is_random_and_the_masks_are_why() -> None:
    """Chi-square over the bytes of what a constant vector became; without the masks it fails by far."""

    def p_of(content: bytes) -> float:
        return float(stats.chisquare(np.bincount(np.frombuffer(content, np.uint8), minlength=256)).pvalue)

    one = session(3)
    one.begin()
    constant = {name: np.full(40_000, 7, dtype=np.uint32) for name in one.names}
    kept: dict[str, bytes] = {}
    one.trip(0, constant, change=lambda masked: kept.update({n: packed(v, BITS) for n, v in masked.items()}))
    assert all(p_of(content) > 1e-4 for content in kept.values())
    assert len(set(kept.values())) == 3
    assert p_of(packed(constant["site-000"], BITS)) < 1e-12
    two = unpacked(kept["site-000"], 40_000, BITS) + unpacked(kept["site-001"], 40_000, BITS)
    assert p_of(packed(two & np.uint32(2**BITS - 1), BITS)) > 1e-4  # two of three are still under masks
    assert p_of(b"".join(one.seen)) > 1e-9  # the sealed shares among it are drawn anew


def test_one_survivors_own_mask_is_needed_too() -> None:
    """A part that comes late, after its masking seed was told, is still under the client's own mask."""
    one = session(4, minimum=2)
    one.begin()
    parts = vectors(one.names, 50)
    late = one.names[0]
    ready = one.members[late]
    _, numbers = secure.masked(ready, 0, parts[late])
    _, survivors = one.trip(0, parts, {"masked": [late]})
    assert late not in survivors
    # the server now has `late`'s masking seed, and its late vector: it takes off all pairwise masks
    holders = sorted((*one.members[one.names[1]].neighbours[late], late))
    there = {place: one.members[n].held[late][0][1] for place, n in enumerate(holders) if n in survivors}
    seed = shares.combined(there, neighbours.threshold(len(holders)))
    ghost = dataclasses.replace(one.members[one.names[1]], name=late)
    naked = numbers.copy()
    for other in survivors:
        naked = naked - secure.signed_mask(ghost, seed, late, other, 0, 50)
    assert not np.array_equal(naked & np.uint32(2**BITS - 1), parts[late])
    own = secure.masked(dataclasses.replace(ready, present=(late,)), 0, parts[late])[1]
    assert np.array_equal(naked & np.uint32(2**BITS - 1), own)  # its own mask is all that is left


# what a hostile server tries


def test_a_server_that_puts_its_own_key_in_a_clients_place_is_refused() -> None:
    one = session(3)
    for name in one.names:
        one.members[name] = secure.begun(name, one.terms, one.who[name].sign)
    roster = {name: member.public for name, member in one.members.items()}
    mine = secure.begun("site-001", one.terms, one.who["site-001"].sign).public
    for public, match in (
        (dataclasses.replace(roster["site-001"], sealing=mine.sealing), "not signed by it"),
        (dataclasses.replace(roster["site-001"], masking=mine.masking), "not signed by it"),
        (dataclasses.replace(mine, signature=roster["site-001"].signature), "not signed by it"),
        (roster["site-002"], "not signed by it"),
        (dataclasses.replace(mine, masking={0: mine.masking[0], 1: mine.sealing}), "other sums"),
    ):
        with pytest.raises(Refused, match=match):
            secure.shared(one.members["site-000"], {**roster, "site-001": public}, one.who["site-000"].verify)
    with pytest.raises(Refused, match="own keys are not on the roster"):
        secure.shared(one.members["site-000"], {**roster, "site-000": mine}, one.who["site-000"].verify)
    with pytest.raises(Refused, match="not signed by it"):  # somebody nobody approved
        secure.shared(one.members["site-000"], {**roster, "mallory": mine}, one.who["site-000"].verify)
    twice = {**roster, "site-001": roster["site-001"]}
    double = dataclasses.replace(roster["site-001"], masking={0: roster["site-001"].sealing})
    double = dataclasses.replace(double, signature=one.who["site-001"].sign(double.statement(one.terms, "site-001")))
    with pytest.raises(Refused, match="stands twice"):
        secure.shared(one.members["site-000"], {**twice, "site-001": double}, one.who["site-000"].verify)


def test_keys_of_another_session_are_refused() -> None:
    """A signature is of its session's terms: a replayed one is none."""
    one = session(3)
    old = dataclasses.replace(one.terms, session="before")
    members = {name: secure.begun(name, one.terms, one.who[name].sign) for name in one.names}
    roster = {name: member.public for name, member in members.items()}
    roster["site-001"] = secure.begun("site-001", old, one.who["site-001"].sign).public
    with pytest.raises(Refused, match="not signed by it"):
        secure.shared(members["site-000"], roster, one.who["site-000"].verify)


def test_a_roster_or_a_list_below_the_minimum_is_refused() -> None:
    one = session(4)
    one.begin()
    small = session(2)
    members = {name: secure.begun(name, small.terms, small.who[name].sign) for name in small.names}
    with pytest.raises(Refused, match="3 are the fewest"):
        secure.shared(members["site-000"], {n: m.public for n, m in members.items()}, small.who["site-000"].verify)
    one.members["site-000"], _ = secure.masked(one.members["site-000"], 0, np.zeros(3, dtype=np.uint32))
    for names, match in (
        (["site-000", "site-001"], "3 are the fewest"),
        (["site-001", "site-002", "site-003"], "not this client"),
        (["site-000", "site-001", "mallory"], "others than those"),
    ):
        with pytest.raises(Refused, match=match):
            secure.agreed_on(one.members["site-000"], 0, names, one.who["site-000"].sign)


def test_two_lists_of_survivors_are_never_signed() -> None:
    one = session(5)
    one.begin()
    name, sign = "site-000", one.who["site-000"].sign
    member, _ = secure.masked(one.members[name], 0, np.zeros(3, dtype=np.uint32))
    with pytest.raises(Refused, match="gave nothing"):
        secure.agreed_on(one.members[name], 0, one.names, sign)
    member, _ = secure.agreed_on(member, 0, one.names, sign)
    member, _ = secure.agreed_on(member, 0, one.names, sign)  # the same one, asked for again
    with pytest.raises(Refused, match="two lists"):
        secure.agreed_on(member, 0, one.names[:4], sign)


def test_both_secrets_of_a_client_are_never_told() -> None:
    """Shares leave only when enough neighbours have signed one list; then one of each client's two, always the same."""
    one = session(5)
    one.begin()
    zeros = np.zeros(3, dtype=np.uint32)
    here = one.names[:4]
    for name in here:
        one.members[name], _ = secure.masked(one.members[name], 0, zeros)
    signed = {}
    for name in here:
        one.members[name], signed[name] = secure.agreed_on(one.members[name], 0, here, one.who[name].sign)
    first, verify = one.members["site-000"], one.who["site-000"].verify
    unsigned = dataclasses.replace(first, signed={})
    with pytest.raises(Refused, match="before a list of survivors was signed"):
        secure.revealed(unsigned, 0, signed, verify)
    forged = {name: one.who[name].sign(survivors_statement(first.digest, 0, one.names)) for name in one.names}
    for wrong, why in (
        ({}, "0 clients signed"),
        (dict(itertools.islice(signed.items(), 3)), "3 clients signed"),
        (forged, "0 clients signed"),
        ({**forged, "site-000": signed["site-000"]}, "1 clients signed"),
    ):
        with pytest.raises(Refused, match=why):
            secure.revealed(first, 0, wrong, verify)
    after, parts = secure.revealed(first, 0, signed, verify)
    again, repeated = secure.revealed(after, 0, signed, verify)
    assert parts == repeated
    held = first.held
    assert parts == {owner: pairs[0][0 if owner in here else 1] for owner, pairs in held.items()}
    assert "site-004" in parts
    assert again.present == tuple(here)
    sign = one.who["site-000"].sign
    assert secure.agreed_on(after, 0, here, sign)[1]  # and of the lists, ever after, the one that was signed
    with pytest.raises(Refused, match="two lists"):
        secure.agreed_on(after, 0, here[:3], sign)


def test_a_second_vector_under_the_same_masks_is_refused() -> None:
    """Two would show their difference."""
    one = session(3, trips=2)
    one.begin()
    member, _ = secure.masked(one.members["site-000"], 0, np.zeros(3, dtype=np.uint32))
    with pytest.raises(Refused, match="second time"):
        secure.masked(member, 0, np.ones(3, dtype=np.uint32))
    with pytest.raises(Refused, match="before the ones before"):
        secure.masked(member, 1, np.ones(3, dtype=np.uint32))
    early = dataclasses.replace(one.members["site-000"], present=())  # before it was told who takes part
    for asked, trip in ((member, 2), (early, 0)):
        with pytest.raises(Refused, match="none that this session"):
            secure.masked(asked, trip, np.ones(3, dtype=np.uint32))


def short(owner: Member) -> bytes:
    """A share for site-000, sealed as it should be, and cut off."""
    key = secure._sealing_key(owner, owner.name, "site-000", "site-000")
    return session_keys.sealed(key, b"short", share_purpose(owner.digest, owner.name, "site-000"))


def test_a_sealed_share_that_was_changed_or_moved_is_refused() -> None:
    one = session(4)
    for name in one.names:
        one.members[name] = secure.begun(name, one.terms, one.who[name].sign)
    roster = {name: member.public for name, member in one.members.items()}
    sealed = {}
    for name in one.names:
        one.members[name], sealed[name] = secure.shared(one.members[name], roster, one.who[name].verify)
    routed = opening.routed(sealed)["site-000"]
    flipped = bytes([routed["site-001"][0] ^ 1]) + routed["site-001"][1:]
    for wrong, match in (
        ({**routed, "site-001": flipped}, "changed on the way"),
        ({**routed, "site-001": routed["site-002"]}, "changed on the way"),
        ({n: s for n, s in routed.items() if n != "site-001"}, "is missing"),
        ({**routed, "site-001": short(one.members["site-001"])}, "has another size"),
    ):
        with pytest.raises(Refused, match=match):
            secure.received(one.members["site-000"], wrong, one.names)
    with pytest.raises(Refused, match=r"fewest|too few"):
        secure.received(one.members["site-000"], routed, ["site-000", "site-001"])
    ready = secure.received(one.members["site-000"], routed, one.names)
    with pytest.raises(Refused, match="already"):
        secure.received(ready, routed, one.names)
    with pytest.raises(Refused, match="another roster already"):
        secure.shared(ready, roster, one.who["site-000"].verify)


def test_a_client_that_sends_a_wrong_share_is_found_where_it_can_be() -> None:
    one = session(4, minimum=2)
    one.begin()
    parts = vectors(one.names, 5)
    masked, signed, revealed = {}, {}, {}
    here = one.names[1:]
    for name in here:
        one.members[name], masked[name] = secure.masked(one.members[name], 0, parts[name])
    for name in here:
        one.members[name], signed[name] = secure.agreed_on(one.members[name], 0, here, one.who[name].sign)
    for name in here:
        one.members[name], revealed[name] = secure.revealed(one.members[name], 0, signed, one.who[name].verify)
    revealed[here[0]] = {**revealed[here[0]], one.names[0]: bytes(16)}
    with pytest.raises(FederationError, match="do not give its key"):
        opening.opened(one.terms, one.roster, 0, one.names, masked, revealed)


# parts


def test_the_masks_of_two_clients_cancel_and_are_of_their_trip() -> None:
    one = session(3, trips=2)
    one.begin()
    a, b = one.members["site-000"], one.members["site-001"]
    for trip in (0, 1):
        x = secure.signed_mask(a, a.masking[trip], a.name, b.name, trip, 100)
        y = secure.signed_mask(b, b.masking[trip], b.name, a.name, trip, 100)
        assert not np.any((x + y) & np.uint32(2**BITS - 1))
    first, second = (secure.signed_mask(a, a.masking[trip], a.name, b.name, trip, 100) for trip in (0, 1))
    assert not np.array_equal(first, second)


@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(1, 32))
def test_packing_loses_nothing(seed: int, size: int, bits: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 2**bits, size).astype(np.uint32)
    content = packed(numbers, bits)
    assert len(content) == packed_size(size, bits) == math.ceil(size * bits / 8)
    assert np.array_equal(unpacked(content, size, bits), numbers)
    with pytest.raises(ValueError, match="bytes"):
        unpacked(content + b"x", size, bits)


def test_packing_across_its_chunks() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**20, 150_001).astype(np.uint32)
    assert np.array_equal(unpacked(packed(numbers, 20), 150_001, 20), numbers)


def test_masks_are_chacha20s_stream() -> None:
    """RFC 8439, appendix A.1, first vector: key and nonce of zeros."""
    stream = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert mask(bytes(32), 8, 32).astype("<u4").tobytes() == stream
    assert np.array_equal(mask(bytes(32), 8, 20), mask(bytes(32), 8, 32) & np.uint32(2**20 - 1))


@given(st.integers(2, 40), st.integers(16, 32), st.integers(1, 5000), st.integers(0, 10**6))
def test_fixed_point_gives_the_weighted_mean_within_its_step(clients: int, bits: int, most: int, seed: int) -> None:
    """Against float64, at the very edge of the range too; the sum never leaves it."""
    rng = np.random.default_rng(seed)
    grid, shapes = Grid(bits, clients, most), {"a": (3, 2), "b": (4,)}
    bounds = {"a": 0.5, "b": 1e-3}
    everybody = range(clients)
    changes = [{n: torch.from_numpy(rng.uniform(-1, 1, s) * bounds[n]) for n, s in shapes.items()} for _ in everybody]
    if seed % 3 == 0:  # all at one edge
        changes = [
            {n: torch.full(s, -bounds[n], dtype=torch.float64) for n, s in shapes.items()} for _ in range(clients)
        ]
    rows = [int(n) for n in rng.integers(1, 2 * most + 1, clients)]
    total = np.zeros(count(shapes, grid), dtype=np.uint32)
    for change, own in zip(changes, rows, strict=True):
        total = (total + encoded(change, bounds, own, grid)) & np.uint32((1 << bits) - 1)
    means, summed_rows = decoded(total, shapes, bounds, grid)
    counted = [min(own, most) for own in rows]
    assert summed_rows == sum(counted)
    for name, shape in shapes.items():
        truth = sum(n * c[name] for n, c in zip(counted, changes, strict=True)) / sum(counted)  # type: ignore[arg-type]
        worst = grid.step(bounds[name]) * clients * most / sum(counted) * clients / 2
        assert means[name].shape == shape
        assert float((means[name] - truth).abs().max()) <= worst * (1 + 1e-9)


@pytest.mark.parametrize("value", [1.001, math.nan, math.inf, -math.inf])
def test_what_is_out_of_range_never_leaves(value: float) -> None:
    with pytest.raises(FloranaError, match="more than the 1"):
        encoded({"a": torch.tensor([0.1, value])}, {"a": 1.0}, 3, Grid(20, 3, 10))


@pytest.mark.parametrize("rows", [0, 31])
def test_rows_that_no_clients_can_have_are_seen(rows: int) -> None:
    grid = Grid(20, 3, 10)
    vector = np.zeros(count({"a": (1,)}, grid), dtype=np.uint32)
    vector[1] = rows
    with pytest.raises(FloranaError, match=f"sum up to {rows}, and 30 are the most"):
        decoded(vector, {"a": (1,)}, {"a": 1.0}, grid)


def test_the_threshold_leaves_no_room_for_two_lists() -> None:
    """Two groups that sign two lists share 2 t - U members at least: one, whatever U."""
    for clients in range(3, 300):
        holders = neighbours.degree(clients) + 1
        assert 2 * neighbours.threshold(holders) > holders


DAMAGED = [
    None,
    {},
    {"session": "x"},
    {**wire.terms_to(terms()), "trips": []},
    {**wire.terms_to(terms()), "trips": [True]},
    {**wire.terms_to(terms()), "bits": -1},
    {**wire.terms_to(terms()), "round": 1.5},
    {**wire.terms_to(terms()), "more": 1},
    {**wire.terms_to(terms()), "run": ""},
    {**wire.terms_to(terms()), "session": "x" * 10_000},
]


@pytest.mark.parametrize("said", DAMAGED, ids=lambda said: str(said)[:30])
def test_damaged_terms_are_refused(said: object) -> None:
    with pytest.raises(Refused):
        wire.terms_from(said)


def test_messages_come_back_as_they_were_and_damaged_ones_are_refused() -> None:
    assert wire.terms_from(wire.terms_to(terms(2))) == terms(2)
    public = Public(bytes(32), {0: b"x" * 32, 1: b"y" * 32}, b"signed")
    assert wire.public_from(wire.public_to(public)) == public
    good = wire.public_to(public)
    for key, value in (
        ("sealing", "zz"),
        ("sealing", "00"),
        ("masking", []),
        ("masking", {"-1": "00" * 32}),
        ("signature", 3),
    ):
        with pytest.raises(Refused):
            wire.public_from({**good, key: value})
    for wrong in ({"a": math.nan}, {"a": -1.0}, {"a": True}, {"a": "1"}, {"": 1.0}, []):
        with pytest.raises(Refused):
            wire.bounds_from(wrong)
    for names in ("abc", [1], [""], None):
        with pytest.raises(Refused):
            wire.names_from(names)
    for number in (-1, 1.0, "x", True, 10**6, None):
        with pytest.raises(Refused):
            wire.number(number)
    assert len(wire.word("00" * 2**15)) == 2**15
    for word in ("00" * (2**15 + 1), "0", "zz", 3, None):
        with pytest.raises(Refused):
            wire.word(word)


def test_a_public_key_that_gives_everybody_the_same_is_refused() -> None:
    with pytest.raises(Refused, match="is none"):
        session_keys.agreed(session_keys.private_of(bytes(16)), bytes(32), "x")


def test_nothing_secret_is_shown() -> None:
    """A member that is printed, in a log or a traceback, shows no secret."""
    one = session(3)
    one.begin()
    text = repr(one.members["site-000"])
    member = one.members["site-000"]
    for secret in (member.sealing, *member.masking.values(), *member.own.values()):
        assert repr(secret)[2:-1] not in text


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("clients", [2, 3, 100])
def test_a_sum_at_the_very_edge_stays_in_its_range(clients: int, sign: float) -> None:
    """All clients at their bound, with all the rows that count: the largest sum that there can be."""
    grid = Grid(16, clients, 7)
    one = encoded({"a": torch.tensor([sign])}, {"a": 1.0}, 7, grid).astype(np.int64)
    total = np.asarray(clients * one % 2**16, dtype=np.uint32)
    means, rows = decoded(total, {"a": (1,)}, {"a": 1.0}, grid)
    assert rows == 7 * clients
    assert float(means["a"]) == pytest.approx(sign, abs=2e-3)
