"""Every method over rounds and with heterogeneous ranks: what is exact stays exact, and no rank is lost for good."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from florana.aggregate.factorization import revive
from florana.errors import RecipeError
from florana.lora.factors import Adapter, LoraFactors
from florana.strategy import STRATEGIES
from florana.strategy.ranks import with_ranks
from tests import oracle
from tests.cases import dense, make_case
from tests.federation import built
from tests.method_cases import RANKS, model_of, scaling_of, start_of, trained, truth_of

MIXED = sorted(name for name in STRATEGIES if built(name).cut is not None and name != "ravan")
"""The methods in which ranks differ; RAVAN's clients differ in the heads they train, between factors of one rank."""


EXACT = ["oracle", "fedex-lora", "flora", "ffa-lora", "rolora", "fedsvd", "fed-sb", "ravan"]


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_are_exact_over_rounds(name: str) -> None:
    """The server's model is the mean of the clients' models, round after round, what they carried included."""
    strategy = built(name)
    state = strategy.init(start_of())
    for seed in range(4):
        parts = trained(strategy, state, seed)
        state = strategy.step(state, parts).state
        for module in state.adapter.modules:
            truth = truth_of(parts, module)
            server = model_of(state.adapter, state.residual, module)
            assert np.linalg.norm(server - truth) <= 1e-6 * np.linalg.norm(truth), (name, seed, module)


@pytest.mark.parametrize("name", ["oracle", "florist", "flora", "ffa-lora"])
def test_mixed_ranks_lose_nothing_in_the_exact_methods(name: str) -> None:
    strategy = STRATEGIES["florist"](energy=1.0) if name == "florist" else built(name)
    strategy = with_ranks(strategy, RANKS, scaling_of)
    state = strategy.init(start_of())
    for seed in range(3):
        parts = trained(strategy, state, seed)
        assert [p.adapter.modules["layer.0.q"].rank for p in parts] == [1, 2, 4]
        assert [p.adapter.modules["layer.0.q"].scaling for p in parts] == [6.0, 3.0, 1.5]
        state = strategy.step(state, parts).state
        for module in state.adapter.modules:
            truth = truth_of(parts, module)
            assert np.linalg.norm(model_of(state.adapter, state.residual, module) - truth) <= 1e-5 * np.linalg.norm(
                truth
            )


@pytest.mark.parametrize("name", ["oracle", "florist", "best-rank"])
def test_what_a_low_rank_cannot_carry_is_carried_frozen(name: str) -> None:
    """Where the rest goes out too, a client of any rank begins at the server's very model."""
    options = {"florist": {"energy": 1.0}, "best-rank": {"broadcast_rank": 9}}
    strategy = with_ranks(STRATEGIES[name](**options.get(name, {})), RANKS, scaling_of)
    state = strategy.init(start_of())
    state = strategy.step(state, trained(strategy, state, 0)).state
    for client in RANKS:
        sent = strategy.brief(state, client)
        for module in state.adapter.modules:
            server = model_of(state.adapter, state.residual, module)
            own = model_of(sent.adapter, sent.residual, module)
            assert np.linalg.norm(own - server) <= 1e-6 * np.linalg.norm(server)


@pytest.mark.parametrize("name", MIXED)
def test_each_client_gets_an_adapter_of_its_own_rank_that_can_be_trained(name: str) -> None:
    """From PEFT's start (B zero) as well as later: no rank is dead in both factors."""
    strategy = with_ranks(built(name), RANKS, scaling_of)
    start = start_of()
    zero = Adapter(
        {n: LoraFactors(torch.zeros_like(p.B), p.A, p.scaling) for n, p in start.modules.items()}, start.extra
    )
    state = strategy.init(zero)
    for seed in range(2):
        for client, rank in RANKS.items():
            for pair in strategy.brief(state, client).adapter.modules.values():
                assert (pair.rank, pair.scaling) == (rank, scaling_of(rank))
                for k in range(rank):
                    assert bool(pair.A[k].any()) or bool(pair.B[:, k].any())
        state = strategy.step(state, trained(strategy, state, seed)).state
        assert {pair.rank for pair in state.adapter.modules.values()} == {4}


@pytest.mark.parametrize("name", MIXED)
def test_a_round_of_low_ranks_alone_leaves_no_rank_dead(name: str) -> None:
    """The target has one term, the server four: the others stay zero in the product, and can be trained."""
    strategy = with_ranks(built(name), RANKS, scaling_of)
    state = strategy.init(start_of())
    for seed in range(2):
        parts = trained(strategy, state, seed)[:1]
        state = strategy.step(state, parts).state
        for client, rank in RANKS.items():
            for module, pair in strategy.brief(state, client).adapter.modules.items():
                assert pair.rank == rank
                sizes = (pair.A.norm(dim=1) + pair.B.norm(dim=0)) / (pair.A.norm() + pair.B.norm())
                assert float(sizes.min()) > 1e-3, (client, module)
        if name in ("best-rank", "oracle", "florist"):
            for module in state.adapter.modules:
                truth = truth_of(parts, module)
                server = model_of(state.adapter, state.residual, module)
                assert np.linalg.norm(server - truth) <= (0.2 if name == "florist" else 1e-6) * np.linalg.norm(truth)


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 5), noise=st.sampled_from([0.0, 1e-9]))
def test_dead_terms_come_alive_and_no_product_changes(seed: int, rank: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    last, case = start_of(seed % 7, rank), make_case(seed, 1, rank, [(9, 13), (14, 6)]).parts[0].adapter
    dead = rng.random(rank) < 0.5
    keep_b, keep_a = (torch.from_numpy(np.where(dead, noise, 1.0)) for _ in "BA")
    half = torch.from_numpy(np.where(rng.random(rank) < 0.5, 0.0, 1.0))  # zero in B alone: as PEFT starts, and alive
    for halved in (False, True):
        modules = {
            n: LoraFactors(p.B * keep_b * (half if halved else 1), p.A * keep_a[:, None], p.scaling)
            for n, p in case.modules.items()
        }
        again = revive(Adapter(modules, case.extra), last)
        for name, pair in again.modules.items():
            size = max(np.linalg.norm(dense(Adapter(modules), name)), 1e-9)
            assert np.linalg.norm(dense(again, name) - dense(Adapter(modules), name)) <= 1e-11 * size
            columns = np.linalg.norm(modules[name].B.numpy(), axis=0)
            rows = np.linalg.norm(modules[name].A.numpy(), axis=1)
            for k in range(rank):
                gone = columns[k] <= 1e-6 * columns.max() and rows[k] <= 1e-6 * rows.max()
                wanted = last.modules[name].A[k] if gone else modules[name].A[k]
                assert torch.equal(pair.A[k], wanted)


@pytest.mark.parametrize("name", ["best-rank", "flexlora"])
def test_a_client_of_a_lower_rank_gets_the_best_adapter_of_that_rank(name: str) -> None:
    strategy = with_ranks(built(name), RANKS, scaling_of)
    state = strategy.step(strategy.init(start_of()), trained(strategy, strategy.init(start_of()), 1)).state
    for client, rank in RANKS.items():
        sent = strategy.brief(state, client).adapter
        for module in sent.modules:
            whole = dense(state.adapter, module)
            best = oracle.best_rank(whole, rank)
            assert np.linalg.norm(dense(sent, module) - best) <= 1e-9 * np.linalg.norm(whole)


def test_where_ranks_cannot_be_mixed_the_reason_is_given() -> None:
    refused = [name for name in STRATEGIES if built(name).cut is None]
    assert {"fedit", "fedex-lora", "rolora", "fedsa-lora", "fedsvd", "fed-sb"} <= set(refused)
    for name in refused:
        with pytest.raises(RecipeError) as caught:
            with_ranks(built(name), RANKS, scaling_of)
        assert built(name).facts.mixed_ranks in str(caught.value)
        assert built(name).facts.mixed_ranks.startswith("refused")
