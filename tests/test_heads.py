"""RAVAN with some heads per client: who trains which, their means, and what travels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from florana.aggregate.cores import mean_cores
from florana.aggregate.error import measure
from florana.errors import InputError
from florana.federation.gate import Expected, RejectedUpdate, validate
from florana.federation.journal import read_records
from florana.federation.messages import Reply, completed, travelling
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy import STRATEGIES
from florana.strategy.base import State
from florana.strategy.random_factors import choice
from florana.strategy.ranks import with_ranks
from tests.federation import built, first_adapter, run
from tests.method_cases import model_of, scaling_of, start_of, trained, truth_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# --- ranks that clients prune ----------------------------------------------------------------------------------------


def one_head(count: int | None = 1, heads: int = 4) -> Any:
    return STRATEGIES["ravan"](heads=heads, size=1, heads_per_client=count)


def test_heads_are_drawn_by_seed_round_and_client() -> None:
    assert choice(3, 1, "a", 8) == choice(3, 1, "a", 8)
    assert len({choice(3, r, c, 8) for r in range(4) for c in "ab"} | {choice(4, 1, "a", 8)}) == 9
    counts = np.bincount([choice(0, r, "a", 4)[0] for r in range(400)], minlength=4)
    assert counts.min() > 70, "not every head is drawn alike"
    strategy = one_head(2)
    state = strategy.init(start_of(1))
    again, other = strategy.init(start_of(1)), strategy.init(start_of(2))
    later = dataclasses.replace(state, round=1)
    draws = [[strategy.brief(s, c).blocks for c in "abcdef"] for s in (state, again, other, later)]
    assert draws[0] == draws[1]
    assert draws[0] not in (draws[2], draws[3])
    assert all(len(set(blocks)) == 2 and set(blocks) <= set(range(4)) for row in draws for blocks in row)
    assert sorted(one_head(None).brief(state, "a").blocks) == [0, 1, 2, 3]


@pytest.mark.parametrize(("ranks", "counts"), [({"c0": 1, "c1": 2, "c2": 4}, [1, 2, 3]), (None, [3, 3, 3])])
def test_clients_of_unlike_means_train_as_many_heads_as_their_rank_holds(
    ranks: dict[str, int] | None, counts: list[int]
) -> None:
    strategy = one_head(3)
    strategy = strategy if ranks is None else with_ranks(strategy, ranks, scaling_of)
    state = strategy.init(start_of())
    for client, count in zip(("c0", "c1", "c2"), counts, strict=True):
        payload = strategy.brief(state, client)
        assert payload.blocks is not None
        assert len(payload.blocks) == count
        assert payload.adapter is state.adapter
        numbers = [t.numel() for n, t in travelling(payload.adapter, {"core"}, payload.blocks).items() if "core" in n]
        assert numbers == [count * 1] * 2
    small = with_ranks(STRATEGIES["ravan"](heads=2, size=2), {"c0": 1, "c1": 3, "c2": 64}, scaling_of)
    assert [len(small.brief(small.init(start_of()), c).blocks or ()) for c in ("c0", "c1", "c2")] == [1, 1, 2]


@given(seed=st.integers(0, 10_000), heads=st.integers(1, 5), size=st.integers(1, 3), clients=st.integers(1, 6))
def test_each_head_is_the_mean_of_those_who_trained_it(seed: int, heads: int, size: int, clients: int) -> None:
    """Float64, written out: weights renormalised per head; a head of nobody stays; extra tensors are everybody's."""
    rng = np.random.default_rng(seed)
    pair = LoraFactors(torch.from_numpy(rng.normal(size=(15, heads * size))),
                       torch.from_numpy(rng.normal(size=(heads * size, 17))), 1.7)  # fmt: skip
    sent = {m: rng.normal(size=(heads, size, size)) for m in "qk"}
    weights = rng.uniform(0.1, 9, clients)
    chosen = [[k for k in range(heads) if rng.random() < 0.5] for _ in range(clients)]
    own = [{m: core.copy() for m, core in sent.items()} for _ in range(clients)]
    for u, blocks in enumerate(chosen):
        for core in own[u].values():
            core[blocks] = rng.normal(size=(len(blocks), size, size))
    parts = [
        Contribution(f"c{u}", Adapter(dict.fromkeys("qk", pair), {"h": torch.full((2,), float(u)).double()},
                     {m: torch.from_numpy(core) for m, core in own[u].items()}), weights[u], blocks=chosen[u])
        for u in range(clients)
    ]  # fmt: skip
    answer = mean_cores(parts)
    for m, core in sent.items():
        for k in range(heads):
            who = [u for u in range(clients) if k in chosen[u]]
            wanted = core[k]
            if who:
                wanted = sum(weights[u] * own[u][m][k] for u in who) / sum(weights[u] for u in who)
            assert np.allclose(answer.cores[m][k].numpy(), wanted, rtol=1e-12, atol=1e-12)
    mean_head = float(sum(w * u for u, w in enumerate(weights)) / weights.sum())
    assert torch.allclose(answer.extra["h"], torch.full((2,), mean_head, dtype=torch.float64))


def test_a_head_whose_trainers_do_not_count_stays_and_a_frozen_head_that_moved_is_named() -> None:
    pair = {"q": LoraFactors(torch.ones(3, 2), torch.ones(2, 4), 1.0)}

    def part(client: str, first: float, second: float, weight: float, blocks: Sequence[int] | None) -> Contribution:
        return Contribution(client, Adapter(pair, cores={"q": torch.tensor([[[first]], [[second]]])}), weight,
                            blocks=blocks)  # fmt: skip

    answer = mean_cores([part("a", 5.0, 1.0, 0.0, [0]), part("b", 2.0, 7.0, 1.0, [1])])
    assert answer.cores["q"].flatten().tolist() == [2.0, 7.0]
    with pytest.raises(InputError, match="block 1 of module 'q' is another one in client 'b' than in 'a'"):
        mean_cores([part("a", 5.0, 1.0, 1.0, [0]), part("b", 2.0, 9.0, 1.0, [0])])
    with pytest.raises(InputError, match=r"client 'b', the core of module 'q'.*not finite"):
        mean_cores([part("a", 5.0, 1.0, 1.0, [0]), part("b", 2.0, math.nan, 1.0, [0])])
    wide = Contribution("b", Adapter(pair, cores={"q": torch.ones(1, 2, 2)}), 1.0)
    with pytest.raises(InputError, match=r"\(1, 2, 2\) in client 'b' but \(2, 1, 1\) in client 'a'"):
        mean_cores([part("a", 5.0, 1.0, 1.0, None), wide])


def test_steps_with_mixed_heads_over_rounds_are_per_head_means() -> None:
    """The strategy's own draws, three rounds, unequal weights and means."""
    strategy = with_ranks(one_head(3), {"c0": 1, "c1": 2, "c2": 4}, scaling_of)
    state: State = strategy.init(start_of())
    for seed in range(3):
        parts = trained(strategy, state, seed)
        after = strategy.step(state, parts).state
        drawn = {p.client: strategy.brief(state, p.client).blocks for p in parts}
        for name, core in state.adapter.cores.items():
            for k in range(4):
                who = [p for p in parts if k in drawn[p.client]]
                assert all(torch.equal(p.adapter.cores[name][k], core[k]) for p in parts if p not in who)
                wanted = core[k]
                if who:
                    wanted = sum(p.weight * p.adapter.cores[name][k] for p in who) / sum(p.weight for p in who)
                assert torch.allclose(after.adapter.cores[name][k], wanted, rtol=1e-12, atol=1e-12)
        assert torch.equal(after.memory["seed"], state.memory["seed"])
        state = after


def test_only_the_chosen_heads_travel_up_and_the_gate_holds_the_reply_to_them(tmp_path: Path) -> None:
    strategy = built("ravan one head")
    state = strategy.init(first_adapter())
    payload = strategy.brief(state, "c")
    assert payload.blocks is not None
    (k,) = payload.blocks
    full = {n: torch.full_like(t, 3.0) for n, t in travelling(payload.adapter, payload.work.up).items()}
    one = {n: t[[k]] if n.startswith("core/") else t for n, t in full.items()}
    expected = Expected(1, {"c": payload})
    update = validate(Reply("c", 1, 5, {}, save(one), 0.0), expected, set())
    for name, core in update.adapter.cores.items():
        assert bool((core[k] == 3).all())
        assert torch.equal(core[1 - k], state.adapter.cores[name][1 - k])
        assert not payload.adapter.cores[name].any(), "the server's own copy was changed"
    for wrong in (full, {n: t[[]] if n.startswith("core/") else t for n, t in full.items()}):
        with pytest.raises(RejectedUpdate, match="has shape"):
            validate(Reply("c", 1, 5, {}, save(wrong), 0.0), expected, set())
    run(tmp_path / "one", "ravan one head", 1)
    run(tmp_path / "all", "ravan", 1)
    (one_record,), (all_record,) = (read_records(tmp_path / name / "rounds.jsonl") for name in ("one", "all"))
    assert all_record.bytes_up - one_record.bytes_up == 3 * 2 * 4 * 4  # clients, modules, numbers of a head, bytes
    assert all_record.bytes_down == one_record.bytes_down
    assert all_record.error["overall"] < 1e-6 < one_record.error["overall"]


def test_the_error_with_some_heads_is_that_of_the_whole_models() -> None:
    strategy = one_head(2)
    state = strategy.init(start_of())
    parts = trained(strategy, state, 0)
    after = strategy.step(state, parts).state
    error = measure(parts, after.adapter, None)
    for name in after.adapter.modules:
        truth = truth_of(parts, name)
        wanted = np.linalg.norm(truth - model_of(after.adapter, None, name)) / np.linalg.norm(truth)
        assert error.modules[name].error == pytest.approx(wanted, rel=1e-6)


def test_what_did_not_travel_stays_and_nothing_is_shared() -> None:
    adapter = built("ravan").init(first_adapter()).adapter
    sent = {n: t + 1 for n, t in travelling(adapter, ["core"], [1]).items()}
    whole = completed(adapter, sent, [1])
    for name, core in adapter.cores.items():
        assert not core.any()
        assert not whole.cores[name][0].any()
        assert bool((whole.cores[name][1] == 1).all())
