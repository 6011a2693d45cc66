"""Every published method: its declarations against what is sent, its formula against a dense oracle, its own traps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from florana.aggregate.core import folded, mean_cores
from florana.aggregate.gauge import alive
from florana.aggregate.half import mean_of_A, mean_of_B
from florana.aggregate.pad import all_padded, norm_weighted_mean
from florana.aggregate.project import best_rank
from florana.aggregate.stack import combined
from florana.errors import InputError, RecipeError
from florana.factors import Adapter, Contribution, LoraFactors, kind_of
from florana.federation.journal import read_records
from florana.federation.messages import Brief, Failure, Reply, completed, pack, travelling, unpack
from florana.strategy import STRATEGIES
from florana.strategy.base import Payload, State, Strategy
from florana.strategy.facts import Size
from florana.strategy.ranks import with_ranks
from tests import oracle
from tests.cases import Case, cases, dense, make_case
from tests.federation import VARIANTS, built, first_adapter, noisy, run

RANKS = {"c0": 1, "c1": 2, "c2": 4}
MIXED = sorted(name for name in STRATEGIES if built(name).cut is not None and name != "ravan")
"""The methods in which ranks differ; RAVAN's clients differ in the heads they train, between factors of one rank."""


def scaling_of(rank: int) -> float:
    return 6.0 / rank


def trained(strategy: Strategy, state: State, seed: int, ranks: Mapping[str, int] | None = None) -> list[Contribution]:
    """Three clients that move what they are asked to train; unequal weights; as the loop would hand them on."""
    rng = np.random.default_rng(seed)
    parts = []
    for client, weight in (("c0", 3.0), ("c1", 1.0), ("c2", 2.5)):
        payload = strategy.brief(state, client)
        tensors = {
            name: tensor + torch.from_numpy(rng.normal(size=tuple(tensor.shape))).to(tensor.dtype)
            if kind_of(name) in payload.work.trains & payload.work.up
            else tensor
            for name, tensor in payload.adapter.tensors().items()
        }
        whole = _adapter(tensors, payload.adapter)
        adapter = completed(payload.adapter, travelling(whole, payload.work.up, payload.blocks), payload.blocks)
        parts.append(Contribution(client, adapter, weight, payload.residual, payload.blocks))
    return parts


def _adapter(tensors: Mapping[str, torch.Tensor], like: Adapter) -> Adapter:
    modules = {n: LoraFactors(tensors[f"B/{n}"], tensors[f"A/{n}"], p.scaling) for n, p in like.modules.items()}
    return Adapter(modules, like.extra, {n: tensors[f"core/{n}"] for n in like.cores})


def start_of(seed: int = 0, rank: int = 4) -> Adapter:
    case = make_case(seed, 1, rank, [(9, 13), (14, 6)])
    scaled = {n: LoraFactors(p.B, p.A, scaling_of(rank)) for n, p in case.parts[0].adapter.modules.items()}
    return Adapter(scaled, case.parts[0].adapter.extra)


def model_of(adapter: Adapter, residual: Adapter | None, module: str) -> np.ndarray:
    """What is added to the base weight, dense, float64, written out."""
    pair = adapter.modules[module]
    middle = np.eye(pair.rank)
    if module in adapter.cores:
        core = adapter.cores[module].double().numpy()
        size = core.shape[1]
        middle = np.zeros((pair.rank, pair.rank))
        for k, block in enumerate(core):
            middle[k * size : (k + 1) * size, k * size : (k + 1) * size] = block
    total = pair.scaling * pair.B.double().numpy() @ middle @ pair.A.double().numpy()
    if residual is not None and module in residual.modules:
        total = total + dense(residual, module)
    return total


def truth_of(parts: Sequence[Contribution], module: str) -> np.ndarray:
    """The weighted mean of the clients' whole models."""
    total = sum(part.weight for part in parts)
    return sum(part.weight / total * model_of(part.adapter, part.residual, module) for part in parts)


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
        again = alive(Adapter(modules, case.extra), last)
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


@pytest.mark.parametrize("name", [*STRATEGIES, *VARIANTS])
def test_a_step_is_a_pure_function(name: str) -> None:
    strategy = built(name)
    state = strategy.init(start_of())
    parts = trained(strategy, state, 0)
    before = {n: t.clone() for n, t in state.adapter.tensors().items()}
    first, second = strategy.step(state, parts).state, strategy.step(state, parts).state
    assert (state.round, first.round) == (0, 1)
    assert all(torch.equal(t, before[n]) for n, t in state.adapter.tensors().items())
    assert all(torch.equal(t, second.adapter.tensors()[n]) for n, t in first.adapter.tensors().items())


@pytest.mark.parametrize("name", [*STRATEGIES, *VARIANTS])
def test_the_declared_counts_are_what_is_sent(name: str, tmp_path: Path) -> None:
    """Numbers in the messages, round by round, against the formulas; bytes are four a number and a small header."""
    strategy = built(name)
    shapes = {module: pair.shape for module, pair in first_adapter().modules.items()}
    seen: list[tuple[Brief, Reply]] = []

    def kept(brief: Brief) -> list[Reply | Failure]:
        reply = noisy(brief, name)
        seen.append((brief, reply))
        return [reply]

    run(tmp_path, name, 4, kept)
    assert len(seen) == 12
    for brief, reply in seen:
        down, up = load(brief.payload), load(reply.payload)
        adapter, _ = unpack(brief.payload, strategy.init(first_adapter()).adapter, {}, brief.scalings)
        held = travelling(adapter, brief.trains, brief.blocks)
        for tensors, count in ((down, strategy.facts.down), (up, strategy.facts.up), (held, None)):
            for module, (out, into) in shapes.items():
                frozen = tensors.get(f"residual/A/{module}")
                core = adapter.cores.get(module)
                size = Size(
                    out=out,
                    into=into,
                    rank=adapter.modules[module].rank,
                    round=brief.round,
                    residual=0 if frozen is None else len(frozen),
                    blocks=1 if core is None else len(core),
                )
                sent = sum(t.numel() for n, t in tensors.items() if n.endswith("/" + module))
                if count is None:  # what is trained: beside a core, one scale per block where scales are trained
                    scales = len(held[f"core/{module}"]) if "scale" in brief.trains else 0
                    assert sent + scales == strategy.facts.trained(size), (name, brief.round, module)
                else:
                    assert sent == count.of(size), (name, brief.round, module, count.text)
        numbers = sum(t.numel() for t in down.values())
        assert 0 < len(brief.payload) - 4 * numbers <= 120 * (len(down) + 1)


def test_flora_na_costs_what_fedit_costs(tmp_path: Path) -> None:
    for name in ("fedit", "flora-na", "best-rank", "fedrot", "lora-fair"):
        run(tmp_path / name, name, 2)
    records = {n: read_records(tmp_path / n / "rounds.jsonl") for n in ("fedit", "flora-na", "best-rank", "fedrot")}
    assert len({tuple((r.bytes_up, r.bytes_down) for r in rounds) for rounds in records.values()}) == 1


@pytest.mark.parametrize("name", [*STRATEGIES, *VARIANTS])
def test_what_is_not_trained_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """A client cannot change what it was not asked to train: the server's copy counts."""
    strategy = built(name)
    state = strategy.init(first_adapter())
    for _ in range(3):
        payload = strategy.brief(state, "c0")
        fixed = {
            n: t for n, t in payload.adapter.tensors().items() if kind_of(n) not in {*payload.work.trains, "extra"}
        }
        parts = trained(strategy, state, 5)
        for part in parts:
            assert all(torch.equal(part.adapter.tensors()[n], t) for n, t in fixed.items())
        after = strategy.step(state, parts).state
        if name in ("ffa-lora", "rolora", "fed-sb", "ravan", "ravan one head"):
            assert all(torch.equal(after.adapter.tensors()[n], t) for n, t in fixed.items())
        state = after


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


@pytest.mark.parametrize("gauge", ["balanced", "orthonormal", "aligned"])
def test_a_gauge_changes_the_factors_and_no_product(gauge: str) -> None:
    strategy, plain = STRATEGIES["best-rank"](gauge=gauge), STRATEGIES["best-rank"]()
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
    strategy = STRATEGIES["best-rank"](memory=100)
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
    short = STRATEGIES["best-rank"](memory=1)
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
    for wrong in ({"broadcast_rank": 0}, {"broadcast_error": 1.0}, {"broadcast_bytes": 0}, {"memory": -1}):
        with pytest.raises(RecipeError):
            STRATEGIES["best-rank"](**wrong)
    with pytest.raises(RecipeError, match="exclude one another"):
        STRATEGIES["best-rank"](broadcast_rank=3, broadcast_error=0.1)
