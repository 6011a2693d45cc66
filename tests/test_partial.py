"""Clients that answer with less than they were sent: HetLoRA's pruned ranks, RAVAN's heads, from strategy to gate."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from florana.aggregate.core import mean_cores
from florana.aggregate.error import measure
from florana.aggregate.pad import leading, tail
from florana.errors import InputError
from florana.factors import Adapter, Contribution, LoraFactors
from florana.federation.gate import Expected, Refused, admit
from florana.federation.journal import read_records
from florana.federation.messages import Brief, Failure, Reply, completed, pack, travelling, unpack
from florana.plan import plan
from florana.recipe_file import check
from florana.run import begin, execute, prepare, strategy_of
from florana.strategy import STRATEGIES
from florana.strategy.base import Payload, Pruning, State
from florana.strategy.draws import choice
from florana.strategy.facts import Size
from florana.strategy.ranks import with_ranks
from florana.train.client import TrainingClients, penalty_of, train_locally
from florana.train.evaluate import evaluate
from florana.train.tasks import collate
from tests.cases import dense, make_case
from tests.federation import built, first_adapter, noisy, run
from tests.test_methods import RANKS, model_of, scaling_of, start_of, trained, truth_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# --- ranks that clients prune ----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 5), beyond=st.integers(0, 4))
def test_the_tail_is_the_product_of_norms_summed_over_modules(seed: int, rank: int, beyond: int) -> None:
    case = make_case(seed, 1, rank + beyond, [(7, 12), (9, 5)])
    wanted = sum(
        math.sqrt(float((c.B[:, rank:] ** 2).sum())) * math.sqrt(float((c.A[rank:] ** 2).sum()))
        for (c,) in case.modules.values()
    )
    assert float(tail(case.parts[0].adapter.modules, rank)) == pytest.approx(wanted, rel=1e-12)


def test_the_tail_of_a_zero_factor_has_a_zero_gradient() -> None:
    """PEFT starts with B = 0: a norm's gradient there must not be NaN."""
    B, A = torch.zeros(3, 2, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    tail({"q": LoraFactors(B, A, 1.0)}, 1).backward()
    assert B.grad is not None
    assert A.grad is not None
    assert not B.grad.any()
    assert not A.grad.any()


@pytest.mark.parametrize(
    ("gamma", "rank", "lower"),
    [(0.99, 8, 7), (0.5, 8, 4), (0.5, 3, 1), (0.1, 4, 1), (0.29, 100, 29), (0.99, 1, None), (1.0, 8, None)],
)
def test_a_client_may_fall_to_one_rank_and_never_below_one(gamma: float, rank: int, lower: int | None) -> None:
    strategy = STRATEGIES["hetlora"](gamma=gamma, penalty=0.25)
    payload = strategy.brief(strategy.init(start_of(rank=rank)), "c0")
    assert payload.pruning == (None if lower is None else Pruning(lower, 0.25))


def test_a_pruned_client_gets_its_lower_rank_from_then_on() -> None:
    """With the recipe's own ranks as well; the others keep theirs; the scaling stays; nobody grows again."""
    for ranks in (None, RANKS):
        strategy = STRATEGIES["hetlora"](gamma=0.5)
        strategy = strategy if ranks is None else with_ranks(strategy, ranks, scaling_of)
        state = strategy.init(start_of(rank=4))
        rank = 4 if ranks is None else RANKS["c2"]
        for seed in range(4):
            payload = strategy.brief(state, "c2")
            sent = payload.adapter.modules["layer.0.q"]
            assert (sent.rank, sent.scaling) == (rank, 1.5)
            parts = trained(strategy, state, seed)
            if seed < 2:
                assert payload.pruning is not None
                rank = payload.pruning.rank
                parts[2] = dataclasses.replace(parts[2], adapter=leading(parts[2].adapter, rank))
            outcome = strategy.step(state, parts)
            state = outcome.state
            own = [4, 4, rank] if ranks is None else [1, 2, rank]
            assert outcome.notes == {"clients": ["c0", "c1", "c2"], "ranks": own}
            assert {name: int(t) for name, t in state.memory.items()} == dict(
                zip(["rank/c0", "rank/c1", "rank/c2"], own, strict=True)
            )
            assert {pair.rank for pair in state.adapter.modules.values()} == {4}
        assert rank == 1
        assert strategy.brief(state, "c2").pruning is None
        first = state.adapter.modules["layer.0.q"]
        sent = strategy.brief(state, "c2").adapter.modules["layer.0.q"]
        assert torch.allclose(sent.scaling * sent.B @ sent.A, first.scaling * first.B[:, :1] @ first.A[:1])


def test_rows_that_nobody_held_keep_their_values_and_the_product_is_that_of_padding() -> None:
    strategy = with_ranks(STRATEGIES["hetlora"](), RANKS, scaling_of)
    state = strategy.init(start_of(rank=4))
    parts = trained(strategy, state, 0)[:2]  # ranks 1 and 2 of 4
    after = strategy.step(state, parts).state
    weights = np.array([part.weight for part in parts])
    sizes = np.array([np.sqrt(sum(np.linalg.norm(dense(p.adapter, n)) ** 2 for n in p.adapter.modules)) for p in parts])
    omega = weights * sizes / (weights * sizes).sum()
    for name, pair in after.adapter.modules.items():
        scaling = max(part.adapter.modules[name].scaling for part in parts)
        B, A = np.zeros(pair.B.shape), np.zeros(pair.A.shape)
        for part, o in zip(parts, omega, strict=True):
            own = part.adapter.modules[name]
            B[:, : own.rank] += o * own.scaling / scaling * own.B.numpy()
            A[: own.rank] += o * own.A.numpy()
        assert np.linalg.norm(dense(after.adapter, name) - scaling * B @ A) <= 1e-9 * np.linalg.norm(scaling * B @ A)
        assert torch.equal(pair.A[2:], state.adapter.modules[name].A[2:])
        assert not pair.B[:, 2:].any()
        assert pair.A[2:].any()


SENT = Payload(first_adapter(), pruning=Pruning(1, 0.1))


def answer_of(adapter: Adapter) -> Reply:
    return Reply("c", 1, 5, {}, pack(adapter), 0.0)


def test_the_gate_lets_the_allowed_rank_through_and_the_full_one() -> None:
    for rank in (1, 2):
        update = admit(answer_of(leading(first_adapter(), rank)), Expected(1, {"c": SENT}), set())
        assert {pair.rank for pair in update.adapter.modules.values()} == {rank}


@pytest.mark.parametrize("case", ["not allowed", "another rank", "mixed", "mixed the other way", "half a pair"])
def test_the_gate_refuses_every_other_rank(case: str) -> None:
    wide = Adapter(
        {n: LoraFactors(torch.ones(p.shape[0], 4), torch.ones(4, p.shape[1]), 1.5) for n, p in
         first_adapter().modules.items()}, first_adapter().extra)  # fmt: skip
    sent = Payload(wide, pruning=Pruning(2, 0.1))
    full, lower, other = wide.tensors(), leading(wide, 2).tensors(), leading(wide, 3).tensors()
    one, two = [{n for n in full if n.endswith(m)} for m in ("layer.0.q", "layer.1.q")]
    tensors = {
        "not allowed": lower,
        "another rank": other,
        "mixed": {n: lower[n] if n in one else t for n, t in full.items()},
        "mixed the other way": {n: lower[n] if n in two else t for n, t in full.items()},
        "half a pair": {n: lower[n] if n.startswith("A/") else t for n, t in full.items()},
    }[case]
    sent = dataclasses.replace(sent, pruning=None) if case == "not allowed" else sent
    reply = dataclasses.replace(answer_of(wide), payload=save({n: t.contiguous() for n, t in tensors.items()}))
    with pytest.raises(Refused, match="has shape"):
        admit(reply, Expected(1, {"c": sent}), set())


def pruning(brief: Brief) -> list[Reply | Failure]:
    """A client of even number prunes wherever it may."""
    reply = noisy(brief, "hetlora pruning")
    if brief.pruning is None or int(brief.client[-1]) % 2:
        return [reply]
    first = built("hetlora pruning").init(first_adapter()).adapter
    adapter, _ = unpack(reply.payload, first, {}, brief.scalings)
    return [dataclasses.replace(reply, payload=pack(leading(adapter, brief.pruning.rank), brief.returns))]


def test_pruned_ranks_outlive_a_kill_and_their_bytes_are_counted(tmp_path: Path) -> None:
    seen: list[tuple[Brief, Reply]] = []

    def watched(brief: Brief) -> list[Reply | Failure]:
        (reply,) = pruning(brief)
        assert isinstance(reply, Reply)
        seen.append((brief, reply))
        return [reply]

    run(tmp_path / "one", "hetlora pruning", 6, watched)
    run(tmp_path / "two", "hetlora pruning", 3, pruning)
    run(tmp_path / "two", "hetlora pruning", 6, pruning)
    for file in ("adapter/adapter_model.safetensors", "checkpoint/round-000006/state.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    kept = load((tmp_path / "one" / "checkpoint/round-000006/state.safetensors").read_bytes())
    assert {n: int(t) for n, t in kept.items() if n.startswith("memory/rank/client-2")} == {"memory/rank/client-2": 1}
    shapes = [pair.shape for pair in first_adapter().modules.values()]
    rank = dict.fromkeys([f"client-{u}" for u in range(5)], 2)
    for brief, reply in seen:
        for payload, own in ((brief.payload, rank[brief.client]), (reply.payload, None)):
            if own is None:
                rank[brief.client] = own = rank[brief.client] if int(brief.client[-1]) % 2 else 1
            numbers = sum(t.numel() for n, t in load(payload).items() if n[0] in "AB")
            count = built("hetlora pruning").facts.up
            assert numbers == sum(count.of(Size(out, into, own)) for out, into in shapes)
    assert set(rank.values()) == {1, 2}
    records = read_records(tmp_path / "one" / "rounds.jsonl")
    assert [r.refused for r in records] == [{}] * 6
    for record in records:
        assert record.bytes_up == sum(len(r.payload) for b, r in seen if b.round == record.round)
        assert record.bytes_down == sum(len(b.payload) for b, _ in seen if b.round == record.round)
        assert record.notes["ranks"] == [1 if int(c[-1]) % 2 == 0 else 2 for c in record.clients]


def test_the_error_counts_a_pruned_client_as_what_it_sent(tmp_path: Path) -> None:
    """The journal's error of a first round, against dense matrices of the very messages."""
    sent: dict[str, tuple[Adapter, int]] = {}

    def watched(brief: Brief) -> list[Reply | Failure]:
        (reply,) = pruning(brief)
        assert isinstance(reply, Reply)
        first = built("hetlora pruning").init(first_adapter()).adapter
        sent[brief.client] = unpack(reply.payload, first, {}, brief.scalings)[0], reply.examples
        return [reply]

    state = run(tmp_path, "hetlora pruning", 1, watched)
    (record,) = read_records(tmp_path / "rounds.jsonl")
    total = sum(examples for _, examples in sent.values())
    missed = size = 0.0
    for name in first_adapter().modules:
        truth = sum(examples / total * dense(adapter, name) for adapter, examples in sent.values())
        missed += float(np.linalg.norm(truth - dense(state.adapter, name)) ** 2)
        size += float(np.linalg.norm(truth) ** 2)
    assert record.error["overall"] == pytest.approx(math.sqrt(missed / size), rel=1e-5)


# --- heads -----------------------------------------------------------------------------------------------------------


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
    update = admit(Reply("c", 1, 5, {}, save(one), 0.0), expected, set())
    for name, core in update.adapter.cores.items():
        assert bool((core[k] == 3).all())
        assert torch.equal(core[1 - k], state.adapter.cores[name][1 - k])
        assert not payload.adapter.cores[name].any(), "the server's own copy was changed"
    for wrong in (full, {n: t[[]] if n.startswith("core/") else t for n, t in full.items()}):
        with pytest.raises(Refused, match="has shape"):
            admit(Reply("c", 1, 5, {}, save(wrong), 0.0), expected, set())
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


# --- clients that train ----------------------------------------------------------------------------------------------


@pytest.fixture
def table(recipe_table: dict[str, Any]) -> dict[str, Any]:
    recipe_table["model"]["rank"] = 4
    return recipe_table


def clients_of(table: dict[str, Any], first: Adapter | None = None) -> tuple[Any, TrainingClients]:
    recipe = check(table, "test")
    setup = prepare(recipe)
    begun = first or Adapter(setup.start.modules, setup.head)
    return setup, TrainingClients(
        setup.bench, begun, setup.clients, setup.common, recipe.train, recipe.evaluate, "average"
    )


def moved(adapter: Adapter, size: float = 0.1) -> Adapter:
    """The adapter with a B that is not zero."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        n: LoraFactors(size * torch.randn(p.B.shape, generator=generator), p.A, p.scaling)
        for n, p in adapter.modules.items()
    }
    return Adapter(modules, adapter.extra)


def test_the_clients_loss_has_the_tail_in_it_and_the_report_has_not(table: dict[str, Any]) -> None:
    """Against the same steps written with nothing but torch."""
    setup, _ = clients_of(table)
    recipe, rows, start = check(table, "test"), setup.clients["client-0"].train, moved(setup.start)
    setup.bench.load(start)
    term = penalty_of(setup.bench.factors, Pruning(1, 0.7))
    loss = train_locally(setup.bench, rows, recipe.train, 3, lambda: None, term)
    ours = setup.bench.adapter()
    setup.bench.load(start)
    setup.bench.model.train()
    optimizer = torch.optim.AdamW(setup.bench.trainable, lr=0.01, weight_decay=0.0)
    pairs = [
        (setup.bench.model.get_parameter(f"base_model.model.{n}.lora_B.default.weight"),
         setup.bench.model.get_parameter(f"base_model.model.{n}.lora_A.default.weight")) for n in start.modules
    ]  # fmt: skip
    order, losses = np.random.default_rng(3).permutation(len(rows)).tolist(), []
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(3):
            chosen, order = order[:8], order[8:]
            plain = setup.bench.forward(collate([rows[i] for i in chosen], 0, torch.device("cpu"))).loss
            losses.append(float(plain.detach()))
            beyond = sum((B[:, 1:] ** 2).sum().sqrt() * (A[1:] ** 2).sum().sqrt() for B, A in pairs)
            (plain + 0.7 * beyond).backward()
            torch.nn.utils.clip_grad_norm_(setup.bench.trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    written = setup.bench.adapter()
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    for name, pair in ours.modules.items():
        assert torch.allclose(pair.A, written.modules[name].A, atol=1e-4)
        assert torch.allclose(pair.B, written.modules[name].B, atol=1e-4)
    setup.bench.load(start)
    train_locally(setup.bench, rows, recipe.train, 3, lambda: None)
    assert any(not torch.allclose(p.B, ours.modules[n].B, atol=1e-3) for n, p in setup.bench.adapter().modules.items())


def test_a_client_prunes_where_its_tail_became_smaller_and_is_measured_as_it_sent(table: dict[str, Any]) -> None:
    setup, clients = clients_of(table)
    start = moved(Adapter(setup.start.modules, setup.head))
    brief = Brief(2, "client-0", 5, pack(start), True, ["A", "B"], ["A", "B"], start.scalings,
                  pruning=Pruning(3, 50.0))  # fmt: skip
    reply, _ = clients.fit(brief, {})
    answer, _ = unpack(reply.payload, start, {}, start.scalings)
    assert {(pair.rank, pair.scaling) for pair in answer.modules.values()} == {(3, 1.5)}
    setup.bench.load(answer)
    scores = evaluate(setup.bench, setup.common, 64)
    assert reply.metrics["clients_on_common/loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert admit(reply, Expected(2, {"client-0": Payload(start, pruning=brief.pruning)}), set())
    first = dataclasses.replace(brief, payload=pack(Adapter(setup.start.modules, setup.head)))  # B = 0: no tail yet
    for asked in (first, dataclasses.replace(brief, pruning=None)):
        whole, _ = unpack(clients.fit(asked, {})[0].payload, start, {}, start.scalings)
        assert {pair.rank for pair in whole.modules.values()} == {4}


def test_heads_that_were_not_chosen_act_but_do_not_move(table: dict[str, Any]) -> None:
    """Not by a gradient, and not by the optimizer's weight decay either."""
    setup, _ = clients_of(table)
    generator = torch.Generator().manual_seed(1)
    drawn = {
        n: LoraFactors(torch.randn(p.shape[0], 6, generator=generator), torch.randn(6, p.shape[1], generator=generator),
                       0.5) for n, p in setup.start.modules.items()
    }  # fmt: skip
    cores = {name: torch.randn(3, 2, 2, generator=generator) for name in drawn}
    adapter = Adapter(drawn, setup.head, cores)
    trains = ["core", "scale"]
    setup.bench.load(adapter, None, trains, blocks=(2, 0))
    some = evaluate(setup.bench, setup.common, 16)
    shapes = sorted(tuple(p.shape) for p in setup.bench.trainable)
    assert shapes == sorted([*[(2, 2, 2), (2,)] * len(cores), *(tuple(t.shape) for t in setup.head.values())])
    settings = check(table, "test").train.model_copy(update={"weight_decay": 0.5})
    train_locally(setup.bench, setup.clients["client-0"].train, settings, 3, lambda: None)
    for name, core in setup.bench.adapter().cores.items():
        assert torch.equal(core[1], cores[name][1])
        assert not torch.allclose(core[0], cores[name][0])
        assert not torch.allclose(core[2], cores[name][2])
    setup.bench.load(adapter, None, trains)
    assert evaluate(setup.bench, setup.common, 16)["loss"] == pytest.approx(some["loss"], rel=1e-6)
    setup.bench.load(Adapter(drawn, setup.head, {n: c * torch.tensor([1.0, 0, 1])[:, None, None] for n, c in
                                                 cores.items()}), None, trains)  # fmt: skip
    assert abs(evaluate(setup.bench, setup.common, 16)["loss"] - some["loss"]) > 1e-5


@pytest.mark.parametrize(
    ("strategy", "model"),
    [
        ({"name": "ravan", "heads": 3, "size": 2, "heads_per_client": 2}, {}),
        ({"name": "ravan", "heads": 2, "size": 2}, {"client_ranks": [2, 4]}),
        ({"name": "hetlora", "gamma": 0.5, "penalty": 0.5}, {}),
        ({"name": "hetlora", "gamma": 0.5, "penalty": 0.5}, {"client_ranks": [4, 2]}),
    ],
    ids=["ravan, two heads", "ravan, ranks", "hetlora", "hetlora, ranks"],
)
def test_a_real_run_plans_its_bytes_resumes_and_prunes(
    strategy: dict[str, Any], model: dict[str, Any], table: dict[str, Any], tmp_path: Path
) -> None:
    table["strategy"] = strategy
    table["model"] |= model
    table["federation"] = {"rounds": 3, "clients_per_round": 4}
    table["train"] |= {"weight_decay": 30.0}  # shrinks the tails fast enough for three rounds
    recipe = check(table, "test")
    setup = prepare(recipe)
    planned = plan(recipe, setup, timed_steps=1)
    whole = execute(recipe, tmp_path / "one", setup=setup)
    chosen = strategy_of(recipe, sorted(setup.clients))
    begun = chosen.init(begin(recipe, setup, chosen))
    counts = []
    for client in setup.clients:
        sent = chosen.brief(begun, client)
        setup.bench.load(sent.adapter, None, sent.work.trains, sent.blocks)
        counts.append(sum(parameter.numel() for parameter in setup.bench.trainable))
    assert planned.trainable_parameters == max(counts)
    assert (planned.bytes_up, planned.bytes_down) == (whole.records[0].bytes_up, whole.records[0].bytes_down)
    table["federation"]["rounds"] = 1
    execute(check(table, "test"), tmp_path / "two", setup=setup)
    execute(recipe, tmp_path / "two", setup=setup, resume=True)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert [dict(r.refused) for r in whole.records] == [{}] * 3
    if strategy["name"] == "hetlora":
        ranks = [record.notes["ranks"] for record in whole.records]
        start = [4, 2, 4, 2] if model else [4] * 4
        assert ranks[0] == start, "the first training starts at B = 0 and must not prune"
        assert ranks[1] != start, "nobody pruned"
        for before, after in itertools.pairwise(ranks):
            assert all(new in (old, max(1, old // 2)) for old, new in zip(before, after, strict=True))
        if sum(ranks[2]) <= sum(ranks[1]) < sum(start):
            assert whole.records[1].bytes_up < whole.records[0].bytes_up
            assert whole.records[2].bytes_down < whole.records[1].bytes_down
    else:
        assert len({record.bytes_up for record in whole.records}) == 1
        assert whole.records[0].bytes_up < whole.records[0].bytes_down
