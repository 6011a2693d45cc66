"""Answer and error from one factorisation: the same as best-rank and measure, whichever way it was computed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from florana.aggregate.best_rank import exact
from florana.aggregate.best_rank.exact import Answer, gathered, judged, nearest
from florana.aggregate.best_rank.project import best_rank
from florana.aggregate.error import measure
from florana.aggregate.mean import mean
from florana.aggregate.stack import stack
from florana.aggregate.validate import shares
from florana.errors import InputError
from florana.lora.factors import Adapter, Contribution, LoraFactors
from tests import oracle
from tests.cases import Case, dense, make_case

SHAPES = {"narrow": [(40, 50), (50, 31)], "as wide as the module": [(9, 30), (30, 9), (12, 12)]}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
DRIFTS = [1.0, 1e-2, 1e-5, 0.0]


def pieces(parts: list[Contribution], name: str) -> list[tuple[float, LoraFactors]]:
    return [(share, part.adapter.modules[name]) for share, part in zip(shares(parts), parts, strict=True)]


def product(answer: Answer) -> np.ndarray:
    return dense(Adapter({"m": answer.pair}), "m")


def same(answer: Answer, parts: list[Contribution], name: str) -> None:
    """The answer's figures are those that `measure` gives for its pair."""
    only = [Contribution(p.client, Adapter({name: p.adapter.modules[name]}), p.weight) for p in parts]
    wanted = measure(only, Adapter({name: answer.pair}))
    assert answer.error == pytest.approx(wanted.error, abs=1e-9, rel=0)
    assert answer.optimum == pytest.approx(wanted.optimum, abs=1e-9, rel=0)
    assert answer.whole == pytest.approx(wanted.norm**2, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_nearest_is_best_rank_and_measure(shapes: str, mixed: bool, drift: float, dtype: torch.dtype) -> None:
    case = make_case(3, clients=5, rank=3, shapes=SHAPES[shapes], drift=drift, mixed_ranks=mixed, dtype=dtype)
    for rank, (name, clients) in itertools.product((2, 3, 5, 40), case.modules.items()):
        answer = nearest(pieces(case.parts, name), rank, dtype)
        reference = best_rank([Contribution(p.client, Adapter(p.adapter.modules), p.weight) for p in case.parts], rank)
        assert answer.pair.rank == rank
        assert answer.pair.B.dtype == dtype
        assert answer.pair.scaling == reference.modules[name].scaling
        same(answer, case.parts, name)
        if dtype == torch.float64:
            wanted, whole = dense(reference, name), np.linalg.norm(oracle.target(clients))
            assert np.linalg.norm(product(answer) - wanted) <= 1e-9 * whole
            assert np.linalg.norm(wanted - oracle.best_rank(oracle.target(clients), rank)) <= 1e-9 * whole
            norms = [answer.pair.B.square().sum(dim=0), answer.pair.A.square().sum(dim=1)]
            assert torch.allclose(norms[0], norms[1], rtol=1e-6, atol=1e-9 * whole), "the pair is balanced"


def ordinary(shapes: str, dtype: torch.dtype = torch.float32) -> Case:
    return make_case(5, clients=5, rank=3, shapes=SHAPES[shapes], drift=1.0, mixed_ranks=True, dtype=dtype)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_adapters_need_no_qr(shapes: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ordinary(shapes, dtype)

    def refuse(*arguments: object) -> None:
        raise AssertionError("QR was taken")

    monkeypatch.setattr("florana.lora.linalg.decompose", refuse)
    monkeypatch.setattr("florana.lora.linalg.norm", refuse)
    monkeypatch.setattr("florana.lora.linalg.singular_values", refuse)
    for name in case.modules:
        answer = nearest(pieces(case.parts, name), 4, dtype)
        assert judged(pieces(case.parts, name), answer.pair).error == pytest.approx(answer.error, abs=1e-9)


def test_where_squares_lose_the_digits_qr_is_taken() -> None:
    case = make_case(1, clients=4, rank=2, shapes=[(30, 20)], drift=1e-7, dtype=torch.float64, equal_scalings=True)
    (name,) = case.modules
    target = gathered(pieces(case.parts, name))
    assert exact._by_gram(target, 2, torch.float64) is None
    answer = nearest(pieces(case.parts, name), 2, torch.float64)
    wanted = np.linalg.svd(oracle.target(case.modules[name]), compute_uv=False)
    assert answer.optimum == pytest.approx(np.sqrt((wanted[2:] ** 2).sum() / (wanted**2).sum()), rel=1e-4)
    assert 0 < answer.optimum < 1e-6


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drift", DRIFTS)
def test_judged_is_measure_for_every_rule(shapes: str, dtype: torch.dtype, drift: float) -> None:
    case = make_case(8, clients=4, rank=3, shapes=SHAPES[shapes], drift=drift, dtype=dtype)
    answers = {"mean": mean(case.parts), "best": best_rank(case.parts, 5), "stack": stack(case.parts)}
    for (rule, answer), name in itertools.product(answers.items(), case.modules):
        found = judged(pieces(case.parts, name), answer.modules[name])
        same(found, case.parts, name)
        if rule == "stack":
            assert found.error <= 2 * torch.finfo(dtype).eps
            assert found.optimum <= 1e-15


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_rounding_of_both_factors_of_a_stack_is_measured(stored: torch.dtype) -> None:
    """A stack written in a narrower type than it was read in: what it misses is the rounding of B and that of A."""
    case = ordinary("narrow")
    for name, pair in stack(case.parts).modules.items():
        narrow = LoraFactors(pair.B.to(stored), pair.A.to(stored), pair.scaling)
        found = judged(pieces(case.parts, name), narrow)
        same(found, case.parts, name)
        assert found.error > 1e-4


@pytest.mark.parametrize("fold", [1, 4, 10_000])
def test_a_sum_folded_piece_by_piece_is_the_sum(fold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, clients=9, rank=3, shapes=[(8, 21), (21, 8), (40, 35)], mixed_ranks=True)
    whole = {name: nearest(pieces(case.parts, name), 4, torch.float64) for name in case.modules}
    monkeypatch.setattr(exact, "FOLD", fold)
    for name, clients in case.modules.items():
        target, dense_sum = gathered(iter(pieces(case.parts, name))), oracle.target(clients)
        assert target.stack.left.shape[1] <= min(dense_sum.shape)
        found = (target.stack.left @ target.stack.right).numpy()
        assert np.linalg.norm(found - dense_sum) <= 1e-13 * np.linalg.norm(dense_sum)
        answer = nearest(iter(pieces(case.parts, name)), 4, torch.float64)
        assert answer.error == pytest.approx(whole[name].error, abs=1e-12)
        assert np.linalg.norm(product(answer) - product(whole[name])) <= 1e-10 * np.linalg.norm(dense_sum)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_twins_zeros_and_opposites(rank: int) -> None:
    """Grams without a Cholesky factor, a sum that is zero, and one that nearly cancels."""
    generator = torch.Generator().manual_seed(0)
    one = LoraFactors(torch.randn(20, 2, generator=generator), torch.randn(2, 30, generator=generator), 0.5)
    other = LoraFactors(torch.randn(20, 3, generator=generator), torch.randn(3, 30, generator=generator), 2.0)
    none = LoraFactors(torch.zeros(20, 2), torch.randn(2, 30, generator=generator), 1.0)
    minus = LoraFactors(-one.B * (1 + 2**-12), one.A, 0.5)
    shared = LoraFactors(torch.randn(20, 2, generator=generator), one.A, 0.5)
    for group in (
        [one, one],
        [one, other, one, none],
        [none, none],
        [one, minus],
        [one, minus, other],
        [one, shared, other],
    ):
        parts = [Contribution(str(u), Adapter({"m": pair}), 1.0) for u, pair in enumerate(group)]
        answer = nearest(pieces(parts, "m"), rank, torch.float32)
        if group == [none, none]:
            assert answer.error == answer.optimum == 0.0
            assert not product(answer).any()
        else:
            same(answer, parts, "m")
            assert answer.error == pytest.approx(answer.optimum, abs=1e-7)


def test_the_same_pieces_give_the_same_answer_and_rank_zero_is_refused() -> None:
    case = ordinary("narrow")
    (name, *_) = case.modules
    first, second = (nearest(pieces(case.parts, name), 3, torch.float32) for _ in range(2))
    assert torch.equal(first.pair.B, second.pair.B)
    assert torch.equal(first.pair.A, second.pair.A)
    with pytest.raises(InputError, match="not at least 1"):
        nearest(pieces(case.parts, name), 0, torch.float32)


@pytest.mark.parametrize("clients", [2, 9])
def test_what_stands_beside_the_answer_counts_with_its_own_scaling(clients: int) -> None:
    """|| target - (s B A + s' B' A') || and the optimum of the answer's rank alone; of few columns, and of many."""
    generator = torch.Generator().manual_seed(clients)

    def pair(rank: int, scaling: float) -> LoraFactors:
        shapes = (7, rank), (rank, 11)
        return LoraFactors(*(torch.randn(*shape, generator=generator) for shape in shapes), scaling)

    parts = [Contribution(str(u), Adapter({"m": pair(2, 1.5)}), 1.0 + u) for u in range(clients)]
    answer, beside = pair(2, 2.0), pair(3, 0.5)
    whole = sum(share * dense(part.adapter, "m") for share, part in zip(shares(parts), parts, strict=True))
    values = np.linalg.svd(whole, compute_uv=False)
    rest = whole - dense(Adapter({"m": answer}), "m") - dense(Adapter({"m": beside}), "m")
    found = measure(parts, Adapter({"m": answer}), Adapter({"m": beside}))
    assert found.error == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(whole), rel=1e-12)
    assert found.optimum == pytest.approx(np.linalg.norm(values[2:]) / np.linalg.norm(values), rel=1e-9, abs=1e-9)
