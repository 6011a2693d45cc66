"""Methods as published: FedRot's turns, FLoRIST's fewer terms, Fed-SB's R_0, FLoRA's spread of A."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from florana import read_adapter
from florana.aggregate.error import measure
from florana.aggregate.rotate import rotation
from florana.errors import RecipeError
from florana.federation.journal import read_records
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.recipe.load import check
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.strategy import STRATEGIES
from florana.strategy.base import State
from florana.strategy.ranks import with_ranks
from tests.cases import dense
from tests.federation import first_adapter, run
from tests.method_cases import RANKS, model_of, scaling_of, start_of, trained, truth_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """The rotation nearest to a matrix: of all L D V^T with det 1 and D of signs, that with the largest trace."""
    left, values, right = np.linalg.svd(matrix)
    signs = np.ones(len(values))
    if np.linalg.det(left) * np.linalg.det(right) < 0:
        signs[np.argmin(values)] = -1.0
    return left @ np.diag(signs) @ right


def turned_mean(parts: list[Contribution], last: Adapter, name: str, factor: str, strength: float) -> np.ndarray:
    """The dense product of the means after each client was turned towards the last A or B, written out."""
    total = sum(part.weight for part in parts)
    B_ref, A_ref = last.modules[name].B.numpy(), last.modules[name].A.numpy()
    B, A = np.zeros_like(B_ref), np.zeros_like(A_ref)
    for part in parts:
        B_u, A_u = part.adapter.modules[name].B.numpy(), part.adapter.modules[name].A.numpy()
        whole = nearest_rotation(A_u @ A_ref.T if factor == "A" else B_u.T @ B_ref)
        O = nearest_rotation((1 - strength) * np.eye(len(A_u)) + strength * whole)  # noqa: E741
        assert np.linalg.det(O) == pytest.approx(1.0)
        B, A = B + part.weight / total * B_u @ O, A + part.weight / total * O.T @ A_u
    return last.modules[name].scaling * B @ A


@pytest.mark.parametrize("strength", [0.0, 0.4, 0.5, 1.0])
def test_fedrot_is_plain_first_and_then_aligns_a_and_b_in_turn(strength: float) -> None:
    strategy = STRATEGIES["fedrot"](strength=strength)
    state = strategy.init(start_of())
    for round_, factor in enumerate(("none", "A", "B", "A"), start=1):
        parts = trained(strategy, state, round_)
        after = strategy.step(state, parts).state
        plain = STRATEGIES["fedit"]().step(state, parts).state.adapter
        for name in after.adapter.modules:
            wanted = dense(plain, name)
            if factor != "none":
                wanted = turned_mean(parts, state.adapter, name, factor, strength)
            assert np.linalg.norm(dense(after.adapter, name) - wanted) <= 1e-9 * np.linalg.norm(wanted)
            if factor != "none" and strength > 0:
                assert np.linalg.norm(wanted - dense(plain, name)) > 1e-3 * np.linalg.norm(wanted)
        state = after


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_rotation_is_the_nearest_one_and_never_a_reflection(size: int) -> None:
    """Matrices of both signs of the determinant: the oracle's, and no random rotation has a larger trace."""
    rng = np.random.default_rng(size)
    seen = set()
    for _ in range(20):
        matrix = rng.normal(size=(size, size))
        seen.add(np.sign(np.linalg.det(matrix)))
        turn = rotation(torch.from_numpy(matrix)).numpy()
        assert np.allclose(turn @ turn.T, np.eye(size))
        assert np.linalg.det(turn) == pytest.approx(1.0)
        assert np.allclose(turn, nearest_rotation(matrix))
        others = [nearest_rotation(rng.normal(size=(size, size))) for _ in range(20)]
        assert np.vdot(turn, matrix) >= max(np.vdot(other, matrix) for other in others) - 1e-12
    assert seen == {-1.0, 1.0}


def test_fedrot_jointly_and_a_run_begun_before_the_turns() -> None:
    """The joint variant aligns from the first round; a later state without the mark goes on as it began."""
    joint, turns = STRATEGIES["fedrot"](align="joint"), STRATEGIES["fedrot"]()
    state = joint.init(start_of())
    parts = trained(joint, state, 1)
    first = joint.step(state, parts).state
    plain = STRATEGIES["fedit"]().step(state, parts).state
    assert np.linalg.norm(dense(first.adapter, "layer.0.q") - dense(plain.adapter, "layer.0.q")) > 1e-3
    old = replace(first, memory={})
    parts = trained(joint, old, 2)
    for name in old.adapter.modules:
        assert np.array_equal(
            dense(turns.step(old, parts).state.adapter, name), dense(joint.step(first, parts).state.adapter, name)
        )
    assert turns.step(old, parts).state.memory == {}
    with pytest.raises(RecipeError, match="strength does not go with"):
        STRATEGIES["fedrot"](align="joint", strength=0.5)
    with pytest.raises(RecipeError, match=r"strength is 1\.5"):
        STRATEGIES["fedrot"](strength=1.5)


def near_rank_one(state: State, seed: int, clients: int, noise: float) -> list[Contribution]:
    """Clients whose updates are one direction and a little noise in a pair of whatever rank they were sent."""
    rng = np.random.default_rng(seed)
    common = {
        n: (rng.normal(size=(p.shape[0], 1)), rng.normal(size=(1, p.shape[1])))
        for n, p in state.adapter.modules.items()
    }
    parts = []
    for u in range(clients):
        modules = {}
        for name, pair in state.adapter.modules.items():
            left, right = common[name]
            B = np.hstack([left, noise * rng.normal(size=(pair.shape[0], pair.rank - 1))])
            A = np.vstack([right, noise * rng.normal(size=(pair.rank - 1, pair.shape[1]))])
            modules[name] = LoraFactors(torch.from_numpy(B), torch.from_numpy(A), pair.scaling)
        parts.append(Contribution(f"c{u}", Adapter(modules, state.adapter.extra), 1.0 + u, state.residual))
    return parts


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("noise", [0.05, 0.5, 3.0])
def test_florist_sends_the_fewest_terms_below_r_too(energy: float, noise: float) -> None:
    """p terms by a dense decomposition, module by module: the first r of them trained, the others frozen."""
    strategy = STRATEGIES["florist"](energy=energy)
    state = strategy.init(start_of(rank=4))
    for seed in range(3):
        parts = near_rank_one(state, seed, 3, noise)
        outcome = strategy.step(state, parts)
        state = outcome.state
        for name, pair in state.adapter.modules.items():
            values = np.linalg.svd(truth_of(parts, name), compute_uv=False)
            share = np.cumsum(values**2) / np.sum(values**2)
            least = int(np.argmax(share >= energy - 1e-12)) + 1
            frozen = state.residual.modules[name].rank if state.residual and name in state.residual.modules else 0
            assert (pair.rank, frozen) == (min(4, least), max(0, least - 4))
            missed = np.linalg.norm(model_of(state.adapter, state.residual, name) - truth_of(parts, name))
            assert missed**2 <= (1 - energy + 1e-9) * float(np.sum(values**2))
        ranks = [pair.rank for pair in state.adapter.modules.values()]
        assert outcome.notes["trained_rank"] == [min(ranks), max(ranks)]


@pytest.mark.shared
def test_florist_on_the_real_adapters_sends_what_the_official_code_sends(shared: Path) -> None:
    """At tau 0.9: 3.8 terms of 8 a module on average, error 0.278."""
    root = shared / "client_adapters" / "minilm-agnews-r8"
    weights = json.loads((root / "weights.json").read_text())["weights"]
    parts = [Contribution(f"c{u}", read_adapter(root / f"client-{u}")[0], w) for u, w in enumerate(weights)]
    strategy = STRATEGIES["florist"](energy=0.9)
    after = strategy.step(strategy.init(parts[0].adapter), parts).state
    assert np.mean([pair.rank for pair in after.adapter.modules.values()]) == pytest.approx(3.8, abs=0.06)
    assert measure(parts, after.adapter, after.residual).error == pytest.approx(0.278, abs=6e-4)


def test_florists_rank_falls_grows_again_and_never_dies() -> None:
    strategy = STRATEGIES["florist"](energy=0.995)
    state = strategy.init(start_of(rank=4))
    state = strategy.step(state, near_rank_one(state, 0, 3, 0.01)).state
    assert {pair.rank for pair in state.adapter.modules.values()} == {1}
    alone = strategy.step(state, near_rank_one(state, 1, 1, 0.01)).state
    assert {pair.rank for pair in alone.adapter.modules.values()} == {1}
    for wanted in (3, 4):  # three clients that go different ways: 1 -> 3 -> 4
        parts = [near_rank_one(state, seed, 1, 1.0)[0] for seed in range(3)]
        parts = [replace(part, client=f"c{u}") for u, part in enumerate(parts)]
        state = strategy.step(state, parts).state
        assert {pair.rank for pair in state.adapter.modules.values()} == {wanted}
    assert {pair.rank for pair in state.adapter.modules.values()} == {4}
    single = strategy.step(state, near_rank_one(state, 5, 1, 0.001)).state
    assert {pair.rank for pair in single.adapter.modules.values()} == {4}, "one client alone cannot grow it again"
    zero = Adapter({n: LoraFactors(0 * p.B, 0 * p.A, p.scaling) for n, p in state.adapter.modules.items()})
    both = [Contribution(f"c{u}", replace(zero, extra=state.adapter.extra), 1.0) for u in range(2)]
    nothing = strategy.step(strategy.init(start_of(rank=4)), both).state.adapter
    assert {pair.rank for pair in nothing.modules.values()} == {1}
    assert all(bool(pair.A.any()) for pair in nothing.modules.values()), "a pair of zeros cannot be trained"


def test_florist_with_fewer_terms_than_a_clients_rank() -> None:
    strategy = with_ranks(STRATEGIES["florist"](energy=0.9), RANKS, scaling_of)
    state = strategy.init(start_of(rank=4))
    parts = near_rank_one(state, 0, 3, 0.4)
    state = strategy.step(state, parts).state
    for client, rank in RANKS.items():
        sent = strategy.brief(state, client)
        for name, pair in state.adapter.modules.items():
            assert sent.adapter.modules[name].rank == min(rank, pair.rank)
            assert sent.adapter.modules[name].scaling == scaling_of(rank)
            server = model_of(state.adapter, state.residual, name)
            own = model_of(sent.adapter, sent.residual, name)
            assert np.linalg.norm(own - server) <= 1e-9 * np.linalg.norm(server)


def test_a_florist_run_begun_before_goes_on() -> None:
    """Its state has r components in every adapter, and no ranks in its memory."""
    strategy = STRATEGIES["florist"](energy=0.5)
    old = replace(strategy.init(start_of(rank=4)), round=3, memory={})
    after = strategy.step(old, near_rank_one(old, 0, 3, 0.01)).state
    assert {pair.rank for pair in after.adapter.modules.values()} == {1}


def test_florists_bytes_are_those_of_the_terms_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "florist", lambda: FEWER)
    run(tmp_path / "run", "florist", 4)
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    monkeypatch.undo()
    run(tmp_path / "fedit", "fedit", 4)
    plain = read_records(tmp_path / "fedit" / "rounds.jsonl")
    assert records[0].bytes_down == plain[0].bytes_down
    numbers = sum(sum(pair.shape) for pair in first_adapter().modules.values())
    assert records[0].notes["trained_rank"] == [1, 1]
    for saved in (plain[1].bytes_down - records[1].bytes_down, plain[1].bytes_up - records[1].bytes_up):
        assert (
            0 <= saved - 3 * 4 * numbers <= 3 * 8 * 4
        )  # four bytes a number, three clients; headers in steps of eight


FEWER = STRATEGIES["florist"](energy=0.2)


def test_a_real_florist_run_of_few_terms_resumes_and_leaves_its_model(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe_table["strategy"] = {"name": "florist", "energy": 0.5}
    recipe_table["model"]["rank"] = 4
    long = check(recipe_table, "test")
    setup = prepare(long)
    whole = execute(long, tmp_path / "whole", setup=setup)
    assert any(record.notes["trained_rank"][0] < 4 for record in whole.records)
    recipe_table["federation"] = {**recipe_table["federation"], "rounds": 2}
    execute(check(recipe_table, "test"), tmp_path / "halved", setup=setup)
    execute(long, tmp_path / "halved", resume=True)
    names = ("adapter_model.safetensors", "adapter_config.json")
    one, two = ([(tmp_path / run_ / "adapter" / n).read_bytes() for n in names] for run_ in ("whole", "halved"))
    assert one == two


def test_fed_sb_from_the_gradient_begins_with_its_product() -> None:
    """s B R_0 A is the pair's product, R_0 its singular values over s; from other starts R_0 is zero."""
    rng = np.random.default_rng(0)
    modules, values = {}, {}
    for name, (out, into) in {"a": (9, 13), "b": (14, 6)}.items():
        left = np.linalg.qr(rng.normal(size=(out, 3)))[0]
        right = np.linalg.qr(rng.normal(size=(into, 3)))[0]
        values[name] = np.array([5.0, 2.0, 0.5])
        root = np.sqrt(values[name] / 1.5)
        modules[name] = LoraFactors(torch.from_numpy(left * root), torch.from_numpy((right * root).T.copy()), 1.5)
    pair = Adapter(modules)
    begun = STRATEGIES["fed-sb"](begin="gradient").init(pair).adapter
    for name in modules:
        assert np.allclose(model_of(begun, None, name), dense(pair, name), atol=1e-12)
        core = begun.cores[name][0].numpy()
        assert np.allclose(core, np.diag(values[name] / 1.5), atol=1e-12)
        assert torch.allclose(begun.modules[name].A @ begun.modules[name].A.T, torch.eye(3, dtype=torch.float64))
    for begin in ("principal", "random"):
        assert not any(bool(c.any()) for c in STRATEGIES["fed-sb"](begin=begin).init(pair).adapter.cores.values())


@pytest.mark.parametrize("drift", [0.2, 5.0])
def test_floras_fresh_a_keeps_the_first_spread(drift: float) -> None:
    """A hundred rounds: from the last A's spread it once wandered to 0.15 or 1.13 of the first."""
    strategy = STRATEGIES["flora"](residual_rank=1)
    begun = start_of()
    modules = {n: LoraFactors(p.B, p.A * drift, p.scaling) for n, p in begun.modules.items()}
    state = strategy.init(Adapter(modules, begun.extra))
    first = {n: float(p.A.std()) for n, p in modules.items()}
    sizes: dict[str, list[float]] = {n: [] for n in modules}
    for seed in range(40):
        parts = trained(strategy, state, seed)
        state = strategy.step(state, parts).state
        for name, pair in state.adapter.modules.items():
            sizes[name].append(float(pair.A.square().mean().sqrt()))
    for name, found in sizes.items():
        assert np.sqrt(np.mean(np.square(found[20:]))) == pytest.approx(first[name], rel=0.08)
    old = replace(state, memory={})
    after = strategy.step(old, trained(strategy, old, 1)).state
    assert {n: float(t) for n, t in after.memory.items()} == {
        f"spread/{n}": float(p.A.std()) for n, p in old.adapter.modules.items()
    }


def test_every_published_method_says_where_it_differs_or_nothing() -> None:
    silent = {name for name, build in STRATEGIES.items() if not build().facts.differs}
    assert silent == {"fedit", "best-rank", "oracle", "ffa-lora", "fedrot", "flexlora"}
