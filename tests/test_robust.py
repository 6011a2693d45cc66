"""The robust rules: against the papers' equations on dense vectors; what any of them holds; what they withstand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from florana.errors import InputError
from florana.robust import clip, multi_krum, trimmed
from florana.robust.cap import capped, usual
from florana.robust.geometric_median import geometric_median
from florana.robust.verdict import Weigh

RULES: dict[str, Weigh] = {
    "multi-krum": multi_krum.multi_krum(1),
    "geometric-median": geometric_median,
    "trimmed": trimmed.trimmed(1),
}
every = pytest.mark.parametrize("name", RULES)


def gram(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows @ rows.T)


def drawn(seed: int, clients: int, size: int = 7) -> tuple[np.ndarray, list[float]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(clients, size)) + 1, list(rng.dirichlet(np.ones(clients)))


# --- the papers' equations, naively


def krum_oracle(rows: np.ndarray, hostile: int) -> set[int]:
    """Blanchard et al.: sums of the n - f - 2 smallest squared distances; the n - f smallest sums."""
    n, result = len(rows), []
    for u in range(n):
        away = sorted(float(np.sum((rows[u] - rows[v]) ** 2)) for v in range(n) if v != u)
        result.append(sum(away[: n - hostile - 2]))
    return set(np.argsort(result)[: n - hostile])


def median_oracle(rows: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The minimum of sum w ||z - x||, found by a general solver."""
    start = np.average(rows, axis=0, weights=weights)
    found = optimize.minimize(
        lambda z: float(np.dot(weights, np.linalg.norm(rows - z, axis=1))), start, method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000},
    )  # fmt: skip
    answer: np.ndarray = found.x
    return answer


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 4), st.integers(1, 3))
def test_multi_krum_keeps_whom_the_paper_keeps(seed: int, more: int, hostile: int) -> None:
    rows, weights = drawn(seed, 2 * hostile + 3 + more)
    found = multi_krum.multi_krum(hostile)(gram(rows), weights)
    kept = krum_oracle(rows, hostile)
    assert {u for u, weight in enumerate(found) if weight > 0} == kept
    total = sum(weights[u] for u in kept)
    assert found == [pytest.approx(weights[u] / total) if u in kept else 0.0 for u in range(len(rows))]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_geometric_median_is_the_point_of_least_weighted_distance(seed: int) -> None:
    rows, weights = drawn(seed, 5, 3)
    beta = geometric_median(gram(rows), weights, smoothing=1e-6)
    z, best = np.array(beta) @ rows, median_oracle(rows, weights)
    reached, least = (float(np.dot(weights, np.linalg.norm(rows - point, axis=1))) for point in (z, best))
    assert reached <= least * (1 + 1e-6)
    assert np.linalg.norm(z - best) < 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 3))
def test_trimming_drops_the_farthest_from_the_geometric_median(seed: int, hostile: int, more: int) -> None:
    rows, weights = drawn(seed, 2 * hostile + 1 + more)
    z = np.array(geometric_median(gram(rows), weights)) @ rows
    away = np.linalg.norm(rows - z, axis=1)
    kept = set(np.argsort(away)[: len(rows) - hostile])
    found = trimmed.trimmed(hostile)(gram(rows), weights)
    assert {u for u, weight in enumerate(found) if weight > 0} == kept


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(0.1, 5))
def test_clipping_leaves_nobody_beyond_the_radius(seed: int, clients: int, radius: float) -> None:
    rows, weights = drawn(seed, clients)
    norms = np.linalg.norm(rows, axis=1)
    limit = radius * np.sort(norms)[(clients - 1) // 2]
    verdict = clip.clip(radius)({"product": gram(rows), "A": torch.zeros(clients, clients)}, weights)
    assert list(verdict.weights) == weights
    for share, norm in zip(verdict.shares, norms, strict=True):
        assert share["product"] * norm == pytest.approx(min(norm, limit))
        assert share["A"] == 1.0


# --- what every rule holds


@every
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), clients=st.integers(5, 9))
def test_weights_are_shares_and_do_not_depend_on_the_order(name: str, seed: int, clients: int) -> None:
    rows, weights = drawn(seed, clients)
    found = RULES[name](gram(rows), weights)
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0
    order = np.random.default_rng(seed).permutation(clients)
    turned = RULES[name](gram(rows[order]), [weights[u] for u in order])
    np.testing.assert_allclose(turned, np.array(found)[order], atol=1e-6)


@every
@pytest.mark.parametrize("point", [0.0, 1.0, 1e-9, 1e9])
def test_equal_clients_keep_their_weights(name: str, point: float) -> None:
    weights = [0.1, 0.2, 0.4, 0.05, 0.25]
    rows = np.full((5, 3), point)
    assert RULES[name](gram(rows), weights) == pytest.approx(weights)


@every
def test_neither_the_basis_nor_the_length_of_the_vectors_matters(name: str) -> None:
    rows, weights = drawn(3, 7)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))[0]
    found = RULES[name](gram(rows), weights)
    np.testing.assert_allclose(RULES[name](gram(rows @ turn * 1e4), weights), found, atol=1e-6)


BREAKDOWN: dict[str, tuple[Callable[[int], Weigh], Callable[[int], int]]] = {
    "multi-krum": (multi_krum.multi_krum, lambda f: 2 * f + 3),
    "trimmed": (trimmed.trimmed, lambda f: 2 * f + 1),
    "geometric-median": (lambda f: functools.partial(geometric_median), lambda f: 2 * f + 1),
}


@pytest.mark.parametrize("name", BREAKDOWN)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), hostile=st.integers(1, 4), far=st.sampled_from([10.0, 1e3, 1e6]))
def test_up_to_its_breakdown_point_a_rule_stays_with_the_honest(name: str, seed: int, hostile: int, far: float) -> None:
    """Colluders at one point, any distance off, in the fewest clients with which the rule is offered."""
    rule, fewest = BREAKDOWN[name]
    clients = fewest(hostile)
    rows, _ = drawn(seed, clients)
    honest = rows[hostile:]
    rows[:hostile] = honest.mean(axis=0) + far
    z = np.array(rule(hostile)(gram(rows), [1 / clients] * clients)) @ rows
    spread = max(np.linalg.norm(row - honest.mean(axis=0)) for row in honest)
    # of 2f + 1 alike, the geometric median is within 2 (n - f) / (n - 2 f) spreads of any honest one (Pillutla, Lemma)
    bound = 2 * (clients - hostile) / (clients - 2 * hostile) + 1 if name == "geometric-median" else 1
    assert np.linalg.norm(z - honest.mean(axis=0)) <= bound * spread * (1 + 1e-6)


@pytest.mark.parametrize("name", ["geometric-median", "trimmed"])
def test_beyond_it_a_rule_is_lost(name: str) -> None:
    """So that the test above can fail: three of five at one point are the median."""
    rows, _ = drawn(1, 5)
    rows[:3] = 1e6
    z = np.array(RULES[name](gram(rows), [0.2] * 5)) @ rows
    assert np.linalg.norm(z) > 1e5


def test_too_few_clients_are_refused_with_the_number_needed() -> None:
    with pytest.raises(InputError, match="needs 7 clients, and 6 are there") as caught:
        multi_krum.multi_krum(2)(torch.eye(6), [1 / 6] * 6)
    assert "federation.min_clients to 7" in caught.value.fix
    with pytest.raises(InputError, match="needs 5 clients"):
        trimmed.trimmed(2)(torch.eye(4), [1 / 4] * 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_a_cap_holds_and_what_is_above_goes_to_the_others_in_proportion(rows: list[float], most: float) -> None:
    weights = {f"c{u}": row for u, row in enumerate(rows)}
    found = capped(weights, most)
    total = sum(rows)
    shares = {client: row / total for client, row in weights.items()}
    held = max(most, 1 / len(rows))
    if max(shares.values()) <= most:
        assert found == weights
        return
    assert sum(found.values()) == pytest.approx(1)
    assert max(found.values()) <= held * (1 + 1e-9)
    free = {client: found[client] / share for client, share in shares.items() if found[client] < held * (1 - 1e-9)}
    assert all(ratio == pytest.approx(next(iter(free.values())), rel=1e-6) for ratio in free.values())
    assert all(ratio >= 1 - 1e-9 for ratio in free.values())


def test_a_liar_with_a_thousand_million_rows_weighs_one_half_of_three_and_a_tenth_of_a_hundred() -> None:
    for others, share in ((2, 0.5), (99, 0.1)):
        found = capped({"liar": 1e9} | {f"c{u}": 54.0 for u in range(others)}, usual(others + 1))
        assert found["liar"] == pytest.approx(share)
    assert capped({"a": 90.0, "b": 10.0}, usual(2)) == {"a": 90.0, "b": 10.0}
