"""The formula that makes each method what it is, against its own oracle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from florana.aggregate.best_rank.project import best_rank
from florana.aggregate.cores import folded, mean_cores
from florana.aggregate.heterogeneous import all_padded, norm_weighted_mean
from florana.aggregate.shared_factor import mean_of_A, mean_of_B
from florana.aggregate.stack import combined
from florana.errors import InputError, RecipeError
from florana.federation.journal import read_records
from florana.federation.messages import pack, unpack
from florana.lora.factors import Adapter, Contribution, LoraFactors, kind_of
from florana.strategy import STRATEGIES
from florana.strategy.base import Payload, State
from florana.strategy.ranks import with_ranks
from tests import oracle
from tests.cases import Case, cases, dense, make_case
from tests.federation import built, first_adapter, run
from tests.method_cases import RANKS, model_of, scaling_of, start_of, trained, truth_of


@given(case=cases(equal_scalings=False), rank=st.integers(0, 2))
def test_hetlora_is_the_norm_weighted_mean_of_padded_factors(case: Case, rank: int) -> None:
    width = case.rank + rank
    answer = norm_weighted_mean(case.parts, width)
    sizes = np.sqrt(
        sum(np.array([np.linalg.norm(c.scaling * c.B @ c.A) ** 2 for c in column]) for column in case.modules.values())
    )
    omega = sizes * oracle.shares(case.modules["layer.0.q"])
    omega = omega / omega.sum()
    for name, column in case.modules.items():
        scaling = max(c.scaling for c in column)
        B = sum(
            o * c.scaling / scaling * np.pad(c.B, ((0, 0), (0, width - c.B.shape[1])))
            for o, c in zip(omega, column, strict=True)
        )
        A = sum(o * np.pad(c.A, ((0, width - c.A.shape[0]), (0, 0))) for o, c in zip(omega, column, strict=True))
        assert np.linalg.norm(dense(answer, name) - scaling * B @ A) <= 1e-9 * np.linalg.norm(scaling * B @ A)


@given(case=cases(mixed_ranks=True))
def test_padding_changes_no_product(case: Case) -> None:
    for before, after in zip(case.parts, all_padded(case.parts, case.rank + 2), strict=True):
        for name in case.modules:
            assert np.allclose(dense(before.adapter, name), dense(after.adapter, name), rtol=0, atol=1e-12)
            assert after.adapter.modules[name].rank == case.rank + 2


def test_a_rank_above_the_servers_is_refused_by_name() -> None:
    case = make_case(0, 3, 2, [(7, 12)], mixed_ranks=True)
    with pytest.raises(InputError, match=r"layer\.0\.q.*rank 3.*padded to 2"):
        norm_weighted_mean(case.parts, 2)


def test_a_client_with_another_shared_factor_is_named() -> None:
    case = make_case(0, 3, 2, [(7, 12)])
    shared = case.parts[0].adapter
    for rule, letter in ((mean_of_B, "A"), (mean_of_A, "B")):
        with pytest.raises(InputError, match=f"factor {letter} of client 'c1'"):
            rule(case.parts, shared)
    cores = {"layer.0.q": torch.zeros(1, 2, 2, dtype=torch.float64)}
    parts = [dataclasses.replace(p, adapter=Adapter(p.adapter.modules, {}, cores)) for p in case.parts]
    with pytest.raises(InputError, match="fixed factors of client 'c1'"):
        mean_cores(parts)
    with pytest.raises(InputError, match="brings cores"):
        STRATEGIES["fedit"]().step(State(0, shared), parts)


def test_flexlora_and_fedsvd_hand_out_orthonormal_rows() -> None:
    for name in ("flexlora", "fedsvd"):
        strategy = built(name)
        state = strategy.init(start_of())
        for seed in range(2):
            state = strategy.step(state, trained(strategy, state, seed)).state
            for pair in state.adapter.modules.values():
                assert torch.allclose(pair.A @ pair.A.T, torch.eye(pair.rank, dtype=pair.A.dtype), atol=1e-6)


def test_fedsvd_starts_with_the_span_of_peft_and_survives_a_round_without_movement() -> None:
    strategy, start = built("fedsvd"), start_of()
    zero = Adapter({n: LoraFactors(torch.zeros_like(p.B), p.A, p.scaling) for n, p in start.modules.items()})
    state = strategy.init(zero)
    still = [Contribution("c0", state.adapter, 1.0)]
    after = strategy.step(state, still).state
    for name in after.adapter.modules:
        A, before = state.adapter.modules[name].A, zero.modules[name].A
        assert torch.allclose(A @ A.T, torch.eye(len(A), dtype=A.dtype), atol=1e-9), "the first A is not orthonormal"
        A = after.adapter.modules[name].A
        assert torch.allclose(A @ A.T, torch.eye(len(A), dtype=A.dtype), atol=1e-9)
        assert torch.allclose(before @ A.T @ A, before, atol=1e-9), "the rows span another space"


def test_fedsa_keeps_every_b_with_its_client(tmp_path: Path) -> None:
    strategy = built("fedsa-lora")
    state = strategy.init(first_adapter())
    after = strategy.step(state, trained(strategy, state, 0)).state
    for name, pair in after.adapter.modules.items():
        assert not pair.B.any()
        assert not torch.equal(pair.A, state.adapter.modules[name].A)
    payload = pack(after.adapter, strategy.brief(after, "c0").work.down)
    own = {f"B/{n}": torch.full_like(p.B, 7.0) for n, p in after.adapter.modules.items()}
    held, _ = unpack(payload, state.adapter, own, after.adapter.scalings)
    assert all(bool((pair.B == 7).all()) for pair in held.modules.values())
    run(tmp_path, "fedsa-lora", 1)
    (record,) = read_records(tmp_path / "rounds.jsonl")
    assert record.error == {"overall": None, "optimum": None, "per_module": {}}


def test_flora_begins_every_round_with_other_factors_and_a_zero_b() -> None:
    strategy = built("flora")
    state = strategy.init(start_of())
    seen = [state.adapter.modules["layer.0.q"].A]
    for seed in range(3):
        state = strategy.step(state, trained(strategy, state, seed)).state
        for pair in state.adapter.modules.values():
            assert not pair.B.any()
        A = state.adapter.modules["layer.0.q"].A
        assert all(not torch.allclose(A, before) for before in seen)
        assert 0.5 < float(A.std() / seen[0].std()) < 2
        seen.append(A)


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "frlora"])
def test_a_bounded_residual_keeps_its_bound_and_its_leading_terms(name: str) -> None:
    whole, cut = STRATEGIES[name](), STRATEGIES[name](residual_rank=3)
    state = whole.init(start_of())
    parts = trained(whole, state, 0)
    full, bounded = whole.step(state, parts).state.residual, cut.step(state, parts).state.residual
    assert full is not None
    assert bounded is not None
    for module, pair in bounded.modules.items():
        assert pair.rank == 3
        best = oracle.best_rank(dense(full, module), 3)
        assert np.linalg.norm(dense(bounded, module) - best) <= 1e-6 * np.linalg.norm(best)
    with pytest.raises(RecipeError, match="residual_rank is 0"):
        STRATEGIES[name](residual_rank=0)


def test_frlora_starts_as_the_base_and_adds_the_factor_means() -> None:
    strategy = built("frlora")
    state = strategy.init(start_of())
    for module in state.adapter.modules:
        size = np.linalg.norm(dense(state.adapter, module))
        assert np.linalg.norm(model_of(state.adapter, state.residual, module)) <= 1e-6 * size
    parts = trained(strategy, state, 3)
    after = strategy.step(state, parts).state
    weights = np.array([part.weight for part in parts]) / sum(part.weight for part in parts)
    for module, pair in state.adapter.modules.items():
        assert torch.equal(after.adapter.modules[module].A, pair.A), "clients do not begin at the principal vectors"
        B = sum(w * p.adapter.modules[module].B.numpy() for w, p in zip(weights, parts, strict=True))
        A = sum(w * p.adapter.modules[module].A.numpy() for w, p in zip(weights, parts, strict=True))
        change = pair.scaling * B @ A - dense(state.adapter, module)
        assert np.linalg.norm(model_of(after.adapter, after.residual, module) - change) <= 1e-6 * np.linalg.norm(change)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_florist_sends_the_fewest_terms_that_hold_the_energy(energy: float) -> None:
    strategy = STRATEGIES["florist"](energy=energy)
    state = strategy.init(start_of(rank=2))
    parts = trained(strategy, state, 1)
    after = strategy.step(state, parts).state
    for module in after.adapter.modules:
        values = np.linalg.svd(truth_of(parts, module), compute_uv=False)
        share = np.cumsum(values**2) / np.sum(values**2)
        least = int(np.argmax(share >= energy - 1e-12)) + 1
        frozen = after.residual.modules[module].rank if after.residual and module in after.residual.modules else 0
        assert 2 + frozen == max(2, least)
    with pytest.raises(RecipeError, match="energy"):
        STRATEGIES["florist"](energy=0.0)


def test_the_fixed_factors_of_fed_sb_and_ravan_are_orthonormal_and_seeded() -> None:
    for strategy in (STRATEGIES["fed-sb"](), STRATEGIES["fed-sb"](begin="random"), built("ravan")):
        one, same = strategy.init(start_of(1)).adapter, strategy.init(start_of(1)).adapter
        other = strategy.init(start_of(2)).adapter
        for name, pair in one.modules.items():
            unit = torch.eye(pair.rank, dtype=pair.A.dtype)
            assert torch.allclose(pair.A @ pair.A.T, unit, atol=1e-9)
            assert torch.allclose(pair.B.T @ pair.B, unit, atol=1e-9)
            assert torch.equal(pair.A, same.modules[name].A)
            assert not torch.allclose(pair.A, other.modules[name].A)
            assert not one.cores[name].any()
    with pytest.raises(InputError, match="64 orthonormal directions do not fit into 6"):
        STRATEGIES["ravan"]().init(first_adapter())


def test_folding_a_core_keeps_the_model_and_is_what_is_exported(tmp_path: Path) -> None:
    strategy = built("ravan")
    state = strategy.init(start_of())
    state = strategy.step(state, trained(strategy, state, 0)).state
    assert any(bool(core.any()) for core in state.adapter.cores.values())
    for module in state.adapter.modules:
        wanted = model_of(state.adapter, None, module)
        assert np.linalg.norm(dense(folded(state.adapter), module) - wanted) <= 1e-12 * np.linalg.norm(wanted)
        assert np.linalg.norm(dense(combined(state.adapter, None), module) - wanted) <= 1e-12 * np.linalg.norm(wanted)


def test_a_core_that_does_not_fit_is_refused() -> None:
    pair = {"q": LoraFactors(torch.ones(3, 2), torch.ones(2, 4), 1.0)}
    for core in (torch.ones(2, 2), torch.ones(1, 3, 3), torch.ones(2, 2, 2)):
        with pytest.raises(InputError, match="core"):
            Adapter(pair, cores={"q": core})
    with pytest.raises(InputError, match="'k'"):
        Adapter(pair, cores={"k": torch.ones(2, 1, 1)})


def test_a_client_of_a_lower_rank_completes_what_did_not_travel_from_the_first_adapter() -> None:
    strategy = with_ranks(built("ffa-lora"), RANKS, scaling_of)
    start = start_of()
    payload: Payload = strategy.brief(strategy.init(start), "c1")
    content = pack(payload.adapter, payload.work.down)
    assert not any(kind_of(name) == "A" for name in load(content))
    held, _ = unpack(content, start, {}, payload.adapter.scalings)
    for name, pair in held.modules.items():
        assert torch.equal(pair.A, start.modules[name].A[:2])
        assert pair.scaling == 3.0
        assert np.allclose(dense(held, name), 1.5 * (start.modules[name].B[:, :2] @ start.modules[name].A[:2]).numpy())


def test_what_clients_carried_frozen_belongs_to_the_best_rank_too() -> None:
    strategy = with_ranks(built("oracle"), RANKS, scaling_of)
    state = strategy.step(strategy.init(start_of()), trained(strategy, strategy.init(start_of()), 0)).state
    parts = trained(strategy, state, 1)
    assert all(part.residual is not None for part in parts)
    answer = best_rank(parts, 3)
    for module in answer.modules:
        truth = truth_of(parts, module)
        best = oracle.best_rank(truth, 3)
        assert np.linalg.norm(dense(answer, module) - best) <= 1e-6 * np.linalg.norm(truth)
