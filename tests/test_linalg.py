"""Factored algebra against dense numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from florana.aggregate.error import measure
from florana.aggregate.mean import mean
from florana.aggregate.stack import stack
from florana.errors import InputError
from florana.lora import linalg
from florana.lora.factors import LoraFactors
from tests import oracle
from tests.cases import Case, cases, dense


@given(case=cases(mixed_ranks=True))
def test_stack_norm_and_spectrum_are_those_of_the_dense_sum(case: Case) -> None:
    for name, column in case.modules.items():
        pairs = [part.adapter.modules[name] for part in case.parts]
        product = linalg.stack(pairs, list(oracle.shares(column)))
        truth = oracle.target(column)
        assert linalg.norm(product) == pytest.approx(np.linalg.norm(truth), rel=1e-10)
        ours = linalg.singular_values(product).numpy()
        theirs = np.linalg.svd(truth, compute_uv=False)[: len(ours)]
        assert np.allclose(ours, theirs, atol=1e-9 * theirs[0])


@given(case=cases(), rank=st.integers(1, 40))
def test_kept_and_the_terms_after_it_add_up_to_the_whole(case: Case, rank: int) -> None:
    for name, column in case.modules.items():
        pairs = [part.adapter.modules[name] for part in case.parts]
        whole = linalg.decompose(linalg.stack(pairs, list(oracle.shares(column))))
        first = linalg.balanced(linalg.kept(whole, rank), 1.7, torch.float64)
        after = linalg.between(whole, rank, len(whole.values))
        total = 1.7 * first.B @ first.A + after.left @ torch.diag(after.values) @ after.right
        assert first.rank == rank
        assert len(after.values) == max(0, len(whole.values) - rank)
        assert torch.allclose(total, torch.from_numpy(oracle.target(column)), atol=1e-9 * float(whole.values[0]))
        assert float(first.B.norm()) == pytest.approx(float(first.A.norm()))


@given(case=cases())
def test_the_reported_error_is_the_dense_error(case: Case) -> None:
    answer = mean(case.parts)
    report = measure(case.parts, answer)
    missed = whole = 0.0
    for name, column in case.modules.items():
        truth = oracle.target(column)
        square = float(np.sum((truth - dense(answer, name)) ** 2))
        size = float(np.sum(truth**2))
        assert report.modules[name].error == pytest.approx(np.sqrt(square / size), rel=1e-6, abs=1e-12)
        best = oracle.best_rank(truth, case.rank)
        assert report.modules[name].optimum == pytest.approx(
            np.linalg.norm(truth - best) / np.sqrt(size), rel=1e-5, abs=1e-10
        )
        missed, whole = missed + square, whole + size
    assert report.error == pytest.approx(np.sqrt(missed / whole), rel=1e-6, abs=1e-12)


@given(case=cases(mixed_ranks=True))
def test_an_exact_answer_has_no_error(case: Case) -> None:
    assert measure(case.parts, stack(case.parts)).error < 1e-12


def test_a_tiny_error_keeps_its_digits() -> None:
    """A relative error of 1e-9 would drown in the difference of two squared norms; the longer stack keeps it."""
    rng = np.random.default_rng(0)
    B, A = torch.from_numpy(rng.normal(size=(20, 2))), torch.from_numpy(rng.normal(size=(2, 30)))
    noise = torch.from_numpy(rng.normal(size=(20, 2)))
    whole = linalg.stack([LoraFactors(B, A, 1.0)], [1.0])
    near = linalg.stack([LoraFactors(B + 1e-9 * noise, A, 1.0)], [1.0])
    truth = float(torch.linalg.matrix_norm(1e-9 * noise @ A))
    assert linalg.norm(linalg.join(whole, near, sign=-1.0)) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(
    ("B", "A", "scaling", "words"),
    [
        (torch.ones(4, 2), torch.ones(3, 5), 1.0, "(4, 2)"),
        (torch.ones(4), torch.ones(3, 5), 1.0, "(4,)"),
        (torch.ones(4, 0), torch.ones(0, 5), 1.0, "rank r of at least 1"),
        (torch.ones(4, 2), torch.ones(2, 5).double(), 1.0, "torch.float64"),
        (torch.ones(4, 2).int(), torch.ones(2, 5).int(), 1.0, "floating-point"),
        (torch.ones(4, 2), torch.ones(2, 5), 0.0, "scaling 0.0"),
        (torch.ones(4, 2), torch.ones(2, 5), float("nan"), "scaling nan"),
    ],
)
def test_factors_that_do_not_fit_are_refused(B: torch.Tensor, A: torch.Tensor, scaling: float, words: str) -> None:
    with pytest.raises(InputError) as caught:
        LoraFactors(B, A, scaling)
    assert words in str(caught.value)
