"""The block power way to the best rank: against the dense oracle on spectra made to mislead it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from florana.adapters.adapter_folder import read_adapter
from florana.aggregate.best_rank import power
from florana.aggregate.best_rank.project import (
    Task,
    best_rank,
    by_gram,
    by_power,
    by_qr,
    cheapest,
    gram_cost,
    iterated,
    pass_cost,
)
from florana.aggregate.error import measure
from florana.aggregate.mean import mean
from florana.errors import InputError
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution, LoraFactors
from tests import oracle
from tests.cases import Case, cases, dense, make_case

SPECTRA = {
    "flat": np.ones(40),
    "clustered at rank": np.concatenate([np.linspace(3, 1.02, 6), 1 - 0.001 * np.arange(6), 0.1 * np.ones(28)]),
    "steep": 10.0 ** -np.arange(0, 20, 0.5),
    "decaying": np.exp(-0.15 * np.arange(40)),
    "deficient": np.concatenate([np.linspace(2, 1, 4), np.zeros(36)]),
    "one large": np.concatenate([[1e4], np.linspace(1, 0.5, 39)]),
}
RANK = 8


def spectrum_parts(values: np.ndarray, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Contribution]:
    """Five clients whose weighted sum has exactly these singular values (up to rounding), 90 x 70."""
    rng = np.random.default_rng(seed)
    L = np.linalg.qr(rng.normal(size=(90, 40)))[0]
    R = np.linalg.qr(rng.normal(size=(70, 40)))[0].T
    weights = np.array([3.0, 1.0, 1.0, 2.0, 0.5])
    mixing = np.linalg.qr(rng.normal(size=(40, 40)))[0] * rng.uniform(0.5, 2.0, size=40)
    B, A = L * values @ mixing, np.linalg.inv(mixing) @ R
    parts = []
    for u in range(5):
        here, scaling = slice(8 * u, 8 * u + 8), [0.5, 2.0, 1.0, 4.0, 2.0][u]
        share = weights[u] / weights.sum() * scaling
        pair = LoraFactors(
            torch.from_numpy(B[:, here] / share).to(dtype), torch.from_numpy(A[here].copy()).to(dtype), scaling
        )
        parts.append(Contribution(f"c{u}", Adapter({"q": pair}), float(weights[u])))
    return parts


def task_of(parts: list[Contribution], rank: int, tolerance: float = 1e-3) -> Task:
    weights = oracle.shares([oracle.Client(np.zeros((1, 1)), np.zeros((1, 1)), 1.0, p.weight) for p in parts])
    pairs = [part.adapter.modules["q"] for part in parts]
    return Task(parts, "q", pairs, weights.tolist(), rank, None, tolerance)


def optimum(task: Task) -> linalg.Decomposition:
    return linalg.kept(linalg.decompose(linalg.stack(task.pairs, task.weights)), task.rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tolerance", [3e-2, 1e-3])
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_error_is_within_the_tolerance_of_the_optimum(kind: str, tolerance: float, dtype: torch.dtype) -> None:
    values = SPECTRA[kind]
    for seed in range(5):
        parts = spectrum_parts(values, dtype, seed)
        truth = sum(
            w * p.adapter.modules["q"].scaling * (p.adapter.modules["q"].B.double() @ p.adapter.modules["q"].A.double())
            for w, p in zip(task_of(parts, RANK).weights, parts, strict=True)
        ).numpy()
        found = iterated(task_of(parts, RANK, tolerance))
        assert found is not None, "it did not settle"
        answer = (found.left * found.values @ found.right).numpy()
        optimum = np.linalg.norm(truth - oracle.best_rank(truth, RANK))
        rounding = (1e-12 if dtype == torch.float64 else 2e-6) * np.linalg.norm(truth)
        assert np.linalg.norm(truth - answer) <= (1 + tolerance) * optimum + rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_gram_matrices_and_qr_give_one_answer(kind: str, dtype: torch.dtype) -> None:
    """The same signs too: of the factors, as far as singular values tell their vectors apart."""
    task = task_of(spectrum_parts(SPECTRA[kind], dtype), RANK)
    ours, exact = by_gram(task), by_qr(task)
    truth, size = exact.B @ exact.A, float((exact.B @ exact.A).norm())
    rounding = 1e-9 if dtype == torch.float64 else 1e-6
    if kind not in ("flat", "clustered at rank"):
        assert float((ours.B @ ours.A - truth).norm()) <= rounding * size
        shown = exact.B.square().sum(dim=0) > 1e-3 * float(exact.B.square().sum(dim=0).max())
        assert torch.allclose(ours.B[:, shown], exact.B[:, shown], atol=100 * rounding * float(exact.B.abs().max()))


@pytest.mark.parametrize("kind", ["steep", "decaying", "one large", "deficient"])
def test_both_ways_agree(kind: str) -> None:
    task = task_of(spectrum_parts(SPECTRA[kind]), RANK, 1e-12)
    ours, exact = iterated(task), optimum(task)
    assert ours is not None
    assert torch.allclose(ours.values, exact.values, atol=1e-9 * float(exact.values[0]))
    product, truth = ours.left * ours.values @ ours.right, exact.left * exact.values @ exact.right
    assert float((product - truth).norm()) <= 1e-7 * float(truth.norm())
    shown = ours.values > 1e-3 * ours.values[0]
    assert torch.allclose(ours.left[:, shown], exact.left[:, shown], atol=1e-4), "signs and vectors"


@given(case=cases(mixed_ranks=True), rank=st.integers(1, 6))
def test_it_finds_the_truncated_dense_svd_of_generated_clients(case: Case, rank: int) -> None:
    answer = best_rank(case.parts, rank, tolerance=1e-6, way=by_power)
    for name, column in case.modules.items():
        truth = oracle.target(column)
        missed = np.linalg.norm(truth - oracle.best_rank(truth, rank))
        assert np.linalg.norm(dense(answer, name) - truth) <= missed * (1 + 1e-3) + 1e-8 * np.linalg.norm(truth)


@pytest.mark.parametrize("kind", SPECTRA)
def test_what_is_called_a_bound_is_one(kind: str) -> None:
    task = task_of(spectrum_parts(SPECTRA[kind]), RANK)
    whole = power.product(task.pairs, task.weights)
    random = torch.randn(90, RANK, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    true = np.sort(SPECTRA[kind])[::-1]
    size = float(np.sum(true**2))
    for passes in range(1, 6):
        found = power.find(whole, RANK, random, 1e-15, passes)
        assert len(found.captured) <= passes
        assert found.bound <= float(np.sum(true[RANK:] ** 2)) + 1e-12 * size
        assert np.all(np.diff(found.captured) >= -1e-12 * size)
        assert found.captured[-1] <= float(np.sum(true[:RANK] ** 2)) + 1e-12 * size


def test_too_few_passes_do_not_settle_and_best_rank_still_answers() -> None:
    parts = spectrum_parts(SPECTRA["clustered at rank"])
    assert iterated(task_of(parts, RANK, 1e-9), passes=1) is None
    few = functools.partial(by_power, passes=1)
    exact = best_rank(parts, RANK, way=by_gram).modules["q"]
    fallen = best_rank(parts, RANK, tolerance=1e-9, way=few).modules["q"]
    assert torch.equal(fallen.B, exact.B)


def test_clients_that_cancel_in_the_mean_are_still_seen() -> None:
    """The largest part of the sum is invisible to both factor means: (b, a) and (-b, -a) have the product b a twice."""
    rng = np.random.default_rng(4)
    b, a = torch.from_numpy(rng.normal(size=(60, 1))) * 10, torch.from_numpy(rng.normal(size=(1, 50)))
    parts = []
    for u, sign in enumerate((1.0, -1.0)):
        others_B, others_A = torch.from_numpy(rng.normal(size=(60, 9))), torch.from_numpy(rng.normal(size=(9, 50)))
        others_B = others_B - b @ (b.T @ others_B) / (b.T @ b)  # nothing else points along b or a
        others_A = others_A - (others_A @ a.T) @ a / (a @ a.T)
        B, A = torch.cat([sign * b, others_B], dim=1), torch.cat([sign * a, others_A], dim=0)
        parts.append(Contribution(f"c{u}", Adapter({"q": LoraFactors(B, A, 1.0)}), 1.0))
    ours = measure(parts, best_rank(parts, 2, tolerance=1e-3, way=by_power))
    assert ours.error <= ours.optimum * 1.001


def test_means_that_vanish_altogether_leave_a_start() -> None:
    rng = np.random.default_rng(5)
    B, A = torch.from_numpy(rng.normal(size=(30, 4))), torch.from_numpy(rng.normal(size=(4, 20)))
    pairs = [LoraFactors(B, A, 1.0), LoraFactors(-B, -A, 1.0)]
    parts = [Contribution(f"c{u}", Adapter({"q": pair}), 1.0) for u, pair in enumerate(pairs)]
    start = Adapter({"q": LoraFactors(torch.zeros_like(B), torch.zeros_like(A), 1.0)})
    ours = measure(parts, best_rank(parts, 2, start=start, tolerance=1e-6, way=by_power))
    assert ours.error <= ours.optimum * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_zero_sum_gives_zeros(dtype: torch.dtype) -> None:
    """The first round: every B is zero."""
    pair = LoraFactors(torch.zeros(30, 4, dtype=dtype), torch.ones(4, 20, dtype=dtype), 2.0)
    parts = [Contribution(f"c{u}", Adapter({"q": pair}), 1.0) for u in range(3)]
    answer = best_rank(parts, 4, way=by_power).modules["q"]
    assert answer.B.shape == (30, 4)
    assert not bool(answer.B.any())
    assert bool(torch.isfinite(answer.A).all())
    assert by_power(task_of(parts, 4)) is not None


def test_one_client_comes_out_as_it_went_in_in_float32() -> None:
    case = make_case(3, 1, 4, [(60, 80)], dtype=torch.float32)
    answer = best_rank(case.parts, 4, way=by_power)
    only = dense(case.parts[0].adapter, "layer.0.q")
    assert np.linalg.norm(dense(answer, "layer.0.q") - only) <= 1e-5 * np.linalg.norm(only)


@given(case=cases())
def test_the_mean_is_never_nearer(case: Case) -> None:
    """One pass from the mean holds FedIT's column space."""
    for name in case.modules:
        pairs = [part.adapter.modules[name] for part in case.parts]
        column = case.modules[name]
        weights = oracle.shares(column).tolist()
        B_0 = torch.from_numpy(sum(w * c.scaling * c.B for w, c in zip(weights, column, strict=True)))
        found = power.find(power.product(pairs, weights), case.rank, B_0, 1.0, 1)
        truth = oracle.target(column)
        ours = np.linalg.norm((found.part.left * found.part.values @ found.part.right).numpy() - truth)
        assert ours <= np.linalg.norm(oracle.fedit(column) - truth) + 1e-9 * np.linalg.norm(truth)


def test_equal_input_gives_equal_bytes() -> None:
    parts = spectrum_parts(SPECTRA["decaying"], torch.float32)
    first, second = (best_rank(parts, RANK, way=by_power).modules["q"] for _ in range(2))
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)


def test_a_good_start_saves_passes_and_a_foreign_one_is_refused() -> None:
    task = task_of(spectrum_parts(SPECTRA["clustered at rank"]), RANK)
    whole, exact = power.product(task.pairs, task.weights), optimum(task)
    random = torch.randn(90, RANK, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    near, far = (power.find(whole, RANK, start, 1e-4, 99) for start in (exact.left, random))
    assert len(near.captured) < len(far.captured)
    other = Adapter({"q": LoraFactors(torch.zeros(91, 2), torch.zeros(2, 70), 1.0)})
    with pytest.raises(InputError, match=r"\(90, 70\).*\(91, 2|\(91, 70\)"):
        best_rank(list(task.parts), RANK, start=other)
    with pytest.raises(InputError, match="absent"):
        best_rank(list(task.parts), RANK, start=Adapter({"k": task.pairs[0]}))


def shaped(clients: int, size: int, rank: int) -> Task:
    """A task of these sizes without its memory: the costs look at shapes only."""
    pair = LoraFactors(torch.zeros(1, rank).expand(size, rank), torch.zeros(1, 1).expand(rank, size), 1.0)
    return Task([], "q", [pair] * clients, [1 / clients] * clients, rank, None, 1e-3)


@pytest.mark.parametrize(
    ("clients", "size", "rank", "iterates"),
    [(10, 4096, 16, False), (20, 4096, 16, True), (100, 4096, 16, True), (7, 384, 8, False), (100, 384, 8, True)],
)
def test_the_cost_model_prefers_the_way_that_was_measured_faster(
    clients: int, size: int, rank: int, iterates: bool
) -> None:
    task = shaped(clients, size, rank)
    assert (gram_cost(task) > 8 * pass_cost(task, 2 * rank)) is iterates


def test_the_cheapest_way_follows_the_cost_model() -> None:
    """Float32 factors: Gram matrices in float64 and the iteration differ in their last digits, and so can be told."""
    rng = np.random.default_rng(0)
    pairs = [
        LoraFactors(
            torch.from_numpy(rng.normal(size=(300, 8))).float(),
            torch.from_numpy(rng.normal(size=(8, 500))).float(),
            1.0,
        )
        for _ in range(40)
    ]
    for count, way in ((2, by_gram), (40, by_power)):
        parts = [Contribution(f"c{u}", Adapter({"q": pair}), 1.0) for u, pair in enumerate(pairs[:count])]
        task = task_of(parts, 8, 1e-2)
        chosen, wanted = cheapest(task), way(task)
        assert wanted is not None
        assert torch.equal(chosen.B, wanted.B)


@pytest.mark.shared
def test_real_adapters_are_within_one_percent_of_the_optimum(shared: Path) -> None:
    folders = sorted((shared / "client_adapters" / "minilm-agnews-r8").glob("client-*"))
    parts = [Contribution(folder.name, read_adapter(folder)[0], 1.0 + u) for u, folder in enumerate(folders)]
    report = measure(parts, best_rank(parts, 8, way=by_power))
    assert report.error <= 1.01 * report.optimum
    assert all(module.error <= 1.01 * module.optimum for module in report.modules.values())
    assert measure(parts, mean(parts)).error > 1.1 * report.optimum, "the adapters are too easy to show anything"


def test_the_decomposition_is_one() -> None:
    found = iterated(task_of(spectrum_parts(SPECTRA["decaying"], torch.float32), RANK))
    assert found is not None
    eye = torch.eye(RANK, dtype=torch.float64)
    assert torch.allclose(found.left.T @ found.left, eye, atol=1e-5)
    assert torch.allclose(found.right @ found.right.T, eye, atol=1e-5)
    assert torch.equal(linalg.fixed_signs(found).left, found.left)
