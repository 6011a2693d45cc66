"""Changes of clients as products: against dense matrices, at heterogeneous ranks, cores, heads; drawn back along a
line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from florana.aggregate.cores import folded
from florana.lora.factors import Adapter, LoraFactors
from florana.robust.changes import Pair, distance_gram, grams, sizes
from florana.robust.shrink import drawn_back

SHAPES = {"layer.0.q": (6, 9), "layer.1.v": (8, 5)}


def adapter(rng: np.random.Generator, rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Adapter:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.from_numpy(scale * rng.normal(size=shape)).to(dtype)

    modules = {n: LoraFactors(drawn(out, rank), drawn(rank, into), 1.5) for n, (out, into) in SHAPES.items()}
    return Adapter(modules, {"head.weight": drawn(3, 4)})


def moved(rng: np.random.Generator, before: Adapter, far: float, rank: int | None = None) -> Adapter:
    modules = {}
    for name, pair in before.modules.items():
        own = rank or pair.rank
        B, A = pair.B[:, :own], pair.A[:own]
        modules[name] = LoraFactors(
            B + far * torch.from_numpy(rng.normal(size=B.shape)).float(),
            A + far * torch.from_numpy(rng.normal(size=A.shape)).float(),
            pair.scaling,
        )
    extra = {n: t + far * torch.from_numpy(rng.normal(size=t.shape)).float() for n, t in before.extra.items()}
    return Adapter(modules, extra)


def dense(pair: Pair) -> np.ndarray:
    """All modules' changes of the product, one after the other, naively in float64."""
    after, before = (folded(one) for one in pair)

    def product(one: Adapter, name: str, rank: int) -> np.ndarray:
        module = one.modules[name]
        return module.scaling * module.B[:, :rank].double().numpy() @ module.A[:rank].double().numpy()

    return np.concatenate(
        [(product(after, n, p.rank) - product(before, n, p.rank)).ravel() for n, p in after.modules.items()]
    )


def pairs_of(seed: int, clients: int, rank: int, far: float, *, zero: bool = False, mixed: bool = False) -> list[Pair]:
    rng = np.random.default_rng(seed)
    before = adapter(rng, rank)
    if zero:
        modules = {n: LoraFactors(torch.zeros_like(p.B), p.A, p.scaling) for n, p in before.modules.items()}
        before = Adapter(modules, before.extra)
    return [(moved(rng, before, far, max(1, rank - u % 2) if mixed else None), before) for u in range(clients)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1e-4, 0.3, 30.0]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_inner_products_are_those_of_the_dense_changes(
    seed: int, clients: int, rank: int, far: float, zero: bool, mixed: bool
) -> None:
    pairs = pairs_of(seed, clients, rank, far, zero=zero, mixed=mixed)
    found = grams(pairs, {"A", "B"})
    rows = np.stack([dense(pair) for pair in pairs])
    np.testing.assert_allclose(found["product"], rows @ rows.T, rtol=1e-9, atol=1e-9 * np.square(rows).sum())
    heads = np.stack([(a.extra["head.weight"].double() - b.extra["head.weight"].double()).flatten() for a, b in pairs])
    np.testing.assert_allclose(found["extra"], heads @ heads.T, rtol=1e-9, atol=1e-12)
    own = sizes(pairs[0], {"A", "B"})
    assert own["product"] == pytest.approx(np.linalg.norm(rows[0]), rel=1e-6)
    change = sum(
        float((p.A.double() - pairs[0][1].modules[n].A[: p.rank].double()).square().sum())
        for n, p in pairs[0][0].modules.items()
    )
    assert own["A"] == pytest.approx(math.sqrt(change))


@pytest.mark.parametrize("other", ["none", "A", "B", "rank", "core"])
def test_more_clients_than_are_multiplied_at_once_and_one_that_began_elsewhere(other: str) -> None:
    pairs = pairs_of(11, 19, 3, 0.2)
    pairs = [
        (Adapter({n: LoraFactors(p.B, p.A, 1.5 + u) for n, p in a.modules.items()}, a.extra), b)
        for u, (a, b) in enumerate(pairs)
    ]
    pairs = [
        (a, Adapter({n: LoraFactors(p.B, p.A, 1.5 + u) for n, p in b.modules.items()}, b.extra))
        for u, (a, b) in enumerate(pairs)
    ]
    rng = np.random.default_rng(12)
    after, before = pairs[7]
    if other in ("A", "B"):
        grown = {n: p.A + 1 if other == "A" else p.A for n, p in before.modules.items()}
        wider = {n: p.B + 1 if other == "B" else p.B for n, p in before.modules.items()}
        before = Adapter(
            {n: LoraFactors(wider[n], grown[n], p.scaling) for n, p in before.modules.items()}, before.extra
        )
    elif other == "rank":
        after = moved(rng, before, 0.2, 2)
    elif other == "core":
        cores = {n: torch.from_numpy(rng.normal(size=(1, 3, 3))).float() for n in before.modules}
        after = Adapter(after.modules, after.extra, {n: 2 * core for n, core in cores.items()})
        after, before = (Adapter(before.modules, one.extra, one.cores or cores) for one in (after, before))
    pairs[7] = (after, before)
    rows = np.stack([dense(pair) for pair in pairs])
    np.testing.assert_allclose(grams(pairs, {"A"})["product"], rows @ rows.T, rtol=1e-7, atol=1e-7 * rows.max() ** 2)


def test_cores_are_measured_between_their_factors() -> None:
    rng = np.random.default_rng(3)
    plain = adapter(rng, 4)
    cores = {n: torch.from_numpy(rng.normal(size=(2, 2, 2))).float() for n in plain.modules}
    later = {n: core + 0.1 * torch.from_numpy(rng.normal(size=core.shape)).float() for n, core in cores.items()}
    pair = (Adapter(plain.modules, plain.extra, later), Adapter(plain.modules, plain.extra, cores))
    found = sizes(pair, {"core"})
    assert found["product"] == pytest.approx(np.linalg.norm(dense(pair)), rel=1e-5)
    assert found.keys() == {"product", "extra"}
    half = drawn_back(pair, {"product": 0.5})
    assert np.linalg.norm(dense((half, pair[1]))) == pytest.approx(0.5 * found["product"], rel=1e-4)


def test_only_what_travels_is_measured_beside_the_product() -> None:
    (pair,) = pairs_of(5, 1, 2, 0.1)
    assert sizes(pair, {"B"}).keys() == {"product", "B", "extra"}


def test_a_factor_written_otherwise_shows_in_the_factors_alone() -> None:
    """(B t, A / t) has the very product, and would ruin an average of factors."""
    (pair,) = pairs_of(6, 1, 2, 0.1)
    turned = Adapter(
        {n: LoraFactors(p.B * 1000, p.A / 1000, p.scaling) for n, p in pair[0].modules.items()}, pair[0].extra
    )
    before, after = sizes(pair, {"A", "B"}), sizes((turned, pair[1]), {"A", "B"})
    assert after["product"] == pytest.approx(before["product"], rel=1e-3)
    assert after["B"] > 1000 * before["B"]


def test_the_unit_of_each_kind_is_its_median_client() -> None:
    found = {
        "product": torch.diag(torch.tensor([1.0, 4.0, 1e12], dtype=torch.float64)),
        "extra": torch.diag(torch.tensor([100.0, 50.0, 25.0], dtype=torch.float64)),
        "A": torch.zeros(3, 3, dtype=torch.float64),
    }
    np.testing.assert_allclose(distance_gram(found).diagonal(), [0.25 + 2, 1 + 1, 2.5e11 + 0.5])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.01, 0.3, 10.0]), st.floats(0.001, 1.0), st.booleans())
def test_drawn_back_is_a_point_of_the_line_at_the_wanted_change(
    seed: int, far: float, share: float, zero: bool
) -> None:
    (pair,) = pairs_of(seed, 1, 2, far, zero=zero)
    whole = np.linalg.norm(dense(pair))
    back = drawn_back(pair, {"product": share})
    assert np.linalg.norm(dense((back, pair[1]))) <= share * whole * (1 + 1e-3) + 1e-5
    (A, A0, A1) = (one.modules["layer.0.q"].A.double() for one in (back, pair[1], pair[0]))
    t = float(((A - A0) * (A1 - A0)).sum() / (A1 - A0).square().sum())
    assert torch.allclose(A, A0 + t * (A1 - A0), atol=1e-5 * far + 1e-6)
    for other in np.linspace(0, t, 7):  # nothing on the way was further off, and what is a little further on is
        modules = {
            n: LoraFactors(
                (q.B + other * (p.B - q.B)).float(), (q.A + other * (p.A - q.A)).float(), p.scaling
            )
            for (n, p), q in zip(pair[0].modules.items(), pair[1].modules.values(), strict=True)
        }  # fmt: skip
        assert np.linalg.norm(dense((Adapter(modules, pair[0].extra), pair[1]))) <= share * whole * (1 + 1e-3) + 1e-5


def test_a_line_that_goes_far_out_and_comes_back_is_left_where_it_first_goes_too_far() -> None:
    before = Adapter({"q": LoraFactors(torch.ones(1, 1), torch.ones(1, 1), 1.0)})
    after = Adapter({"q": LoraFactors(torch.full((1, 1), -9.0), torch.full((1, 1), -0.1), 1.0)})  # product 1 - 0.1
    back = drawn_back((after, before), {"product": 0.5})  # D(t) = -11.1 t + 11 t^2: -0.1 at t = 1
    t = (1 - float(back.modules["q"].B)) / 10
    assert abs(-11.1 * t + 11 * t * t) == pytest.approx(0.05, rel=1e-4)
    assert t < 0.01


def test_the_share_of_a_head_or_a_factor_holds_too() -> None:
    (pair,) = pairs_of(8, 1, 2, 0.5)
    back = drawn_back(pair, {"product": 1.0, "extra": 0.25})
    change = back.extra["head.weight"] - pair[1].extra["head.weight"]
    assert torch.allclose(change, 0.25 * (pair[0].extra["head.weight"] - pair[1].extra["head.weight"]), atol=1e-6)
    assert drawn_back(pair, {"product": 1.0}) is pair[0]
