"""HetLoRA prunes ranks: the tail, the gate, the journal, and the error of what was really sent."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from florana.aggregate.heterogeneous import leading, tail
from florana.federation.gate import Expected, RejectedUpdate, validate
from florana.federation.journal import read_records
from florana.federation.messages import Brief, Failure, Reply, pack, unpack
from florana.lora.factors import Adapter, LoraFactors
from florana.strategy import STRATEGIES
from florana.strategy.base import Payload, Pruning
from florana.strategy.facts import Size
from florana.strategy.ranks import with_ranks
from tests.cases import dense, make_case
from tests.federation import built, first_adapter, noisy, run
from tests.method_cases import RANKS, scaling_of, start_of, trained

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
        update = validate(answer_of(leading(first_adapter(), rank)), Expected(1, {"c": SENT}), set())
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
    with pytest.raises(RejectedUpdate, match="has shape"):
        validate(reply, Expected(1, {"c": sent}), set())


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
    assert sum(record.weights.values()) == pytest.approx(1.0)
    missed = size = 0.0
    for name in first_adapter().modules:
        truth = sum(record.weights[client] * dense(adapter, name) for client, (adapter, _) in sent.items())
        missed += float(np.linalg.norm(truth - dense(state.adapter, name)) ** 2)
        size += float(np.linalg.norm(truth) ** 2)
    assert record.error["overall"] == pytest.approx(math.sqrt(missed / size), rel=1e-5)
