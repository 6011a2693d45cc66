"""The choices of best-rank: its gauge, its memory and a wider broadcast."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from florana.errors import RecipeError
from florana.strategy import STRATEGIES
from tests import oracle
from tests.cases import dense
from tests.method_cases import model_of, start_of, trained, truth_of


@pytest.mark.parametrize("gauge", ["balanced", "orthonormal", "aligned"])
def test_a_gauge_changes_the_factors_and_no_product(gauge: str) -> None:
    strategy, plain = STRATEGIES["best-rank"](factorization=gauge), STRATEGIES["best-rank"]()
    state = strategy.init(start_of())
    parts = trained(strategy, state, 0)
    one, other = strategy.step(state, parts).state.adapter, plain.step(state, parts).state.adapter
    for name, pair in one.modules.items():
        assert np.linalg.norm(dense(one, name) - dense(other, name)) <= 1e-9 * np.linalg.norm(dense(other, name))
        if gauge == "orthonormal":
            assert torch.allclose(pair.A @ pair.A.T, torch.eye(pair.rank, dtype=pair.A.dtype), atol=1e-9)
        if gauge == "aligned":
            last = state.adapter.modules[name]
            near, far = (
                (p.A - last.A).square().sum() + (p.B - last.B).square().sum() for p in (pair, other.modules[name])
            )
            assert near <= far + 1e-9


def test_memory_adds_what_was_kept_to_the_next_target() -> None:
    strategy = STRATEGIES["best-rank"](carry_rank=100)
    state = strategy.init(start_of(rank=2))
    parts = trained(strategy, state, 0)
    first = strategy.step(state, parts).state
    parts_2 = trained(strategy, first, 1)
    second = strategy.step(first, parts_2).state
    for module in state.adapter.modules:
        kept = truth_of(parts, module) - dense(first.adapter, module)
        assert np.linalg.norm(kept) > 0.01
        wanted = oracle.best_rank(truth_of(parts_2, module) + kept, 2)
        assert np.linalg.norm(dense(second.adapter, module) - wanted) <= 1e-6 * np.linalg.norm(wanted)
    short = STRATEGIES["best-rank"](carry_rank=1)
    kept_short = short.step(state, parts).state.memory
    assert {tensor.shape[0] for name, tensor in kept_short.items() if "/A/" in name} == {1}


def test_a_wider_broadcast_loses_what_its_rule_allows() -> None:
    start = start_of(rank=2)
    for options in ({"broadcast_rank": 5}, {"broadcast_error": 0.1}, {"broadcast_bytes": 4 * 4 * 42}):
        strategy = STRATEGIES["best-rank"](**options)
        state = strategy.init(start)
        parts = trained(strategy, state, 0)
        after = strategy.step(state, parts).state
        sent = 0
        for module, pair in after.adapter.modules.items():
            truth = truth_of(parts, module)
            missed = np.linalg.norm(truth - model_of(after.adapter, after.residual, module)) / np.linalg.norm(truth)
            frozen = after.residual.modules[module].rank if after.residual and module in after.residual.modules else 0
            sent += (2 + frozen) * sum(pair.shape)
            if "broadcast_rank" in options:
                tail = np.linalg.norm(np.linalg.svd(truth, compute_uv=False)[5:]) / np.linalg.norm(truth)
                assert missed == pytest.approx(tail, abs=1e-9)
            if "broadcast_error" in options:
                assert missed <= 0.1 + 1e-9
        if "broadcast_bytes" in options:
            assert 2 * 42 < sent <= 4 * 42
    for wrong in ({"broadcast_rank": 0}, {"broadcast_error": 1.0}, {"broadcast_bytes": 0}, {"carry_rank": -1}):
        with pytest.raises(RecipeError):
            STRATEGIES["best-rank"](**wrong)
    with pytest.raises(RecipeError, match="exclude one another"):
        STRATEGIES["best-rank"](broadcast_rank=3, broadcast_error=0.1)
