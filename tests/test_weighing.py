"""What an update may be, and how much it counts: the gate's bounds, row counts, the cap and [robust] in the loop."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from florana.errors import RecipeError
from florana.federation.gate import Expected, RejectedUpdate, validate
from florana.federation.journal import read_records
from florana.federation.messages import Brief, Failure, Reply, pack, question_in
from florana.federation.step_bounds import reach_of
from florana.federation.trip_memory import update_in
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.setup import execute
from florana.strategy import STRATEGIES
from florana.strategy.base import Payload
from tests.federation import _KEPT, built, first_adapter, noisy, run

# --- how far training reaches


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3).filter(lambda g: g == 0 or abs(g) > 1e-3), min_size=1, max_size=25),
    st.floats(1e-4, 0.1),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.floats(-10, 10),
)
def test_no_gradients_move_a_number_further_than_its_reach(
    gradients: list[float], rate: float, decay: float, begin: float
) -> None:
    """torch's own AdamW, whatever the gradients."""
    number = torch.nn.Parameter(torch.tensor([begin], dtype=torch.float64))
    optimizer = torch.optim.AdamW([number], lr=rate, weight_decay=decay)
    for gradient in gradients:
        number.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    reach = reach_of(rate, decay, len(gradients))
    assert abs(float(number.detach()) - begin) <= (reach.moves + reach.decay * abs(begin)) * (1 + 1e-9)


def test_the_reach_is_not_far_from_what_gradients_can_do() -> None:
    """The bound is the step's own maximum: gradients in proportion to a_i / b_i attain c_T in the last step."""
    steps, (first, second) = 12, (0.9, 0.999)
    a = [(1 - first) * first ** (steps - 1 - i) for i in range(steps)]
    b = [(1 - second) * second ** (steps - 1 - i) for i in range(steps)]
    number = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([number], lr=1.0, weight_decay=0.0, eps=0.0)
    for one, other in zip(a, b, strict=True):
        last = float(number.detach())
        number.grad = torch.tensor([one / other], dtype=torch.float64)
        optimizer.step()
    wanted = reach_of(1.0, 0.0, steps).moves - reach_of(1.0, 0.0, steps - 1).moves
    assert abs(float(number.detach()) - last) == pytest.approx(wanted, rel=1e-9)


def reply_with(change: float, kind: str = "A") -> tuple[Reply, Expected]:
    sent = Payload(first_adapter())
    tensors = {n: t.clone() for n, t in sent.adapter.tensors().items()}
    name = next(name for name in tensors if name.startswith(kind))
    tensors[name].view(-1)[1] += change
    expected = Expected(1, {"a": sent}, reach=lambda rows: reach_of(0.01, 0.0, rows))
    return Reply("a", 1, 8, {}, save(tensors), 0.1), expected


@pytest.mark.parametrize("kind", ["A", "B", "extra"])
def test_a_number_beyond_the_reach_of_the_recipe_is_refused_whoever_else_is_there(kind: str) -> None:
    reach = reach_of(0.01, 0.0, 8).moves
    assert 0.08 < reach < 0.083
    assert validate(*reply_with(reach, kind), ()).client == "a"
    with pytest.raises(RejectedUpdate, match=rf"tensor '{kind}/.*' was changed 1\.9 times as much as any training"):
        validate(*reply_with(2 * reach, kind), ())


def test_a_core_with_its_scale_multiplied_in_reaches_further() -> None:
    reach = reach_of(0.1, 0.0, 1)
    core = torch.tensor([2.0])
    assert float(reach.of("core/q", core, {"core"})) == pytest.approx(0.105, rel=1e-4)
    both = (1 + 0.1) * (2 + 0.1) - 2  # s H at its largest
    assert float(reach.of("core/q", core, {"core", "scale"})) == pytest.approx(1.05 * both, rel=1e-4)


@pytest.mark.parametrize("uplink", ["float32", "int8"])
@pytest.mark.parametrize("strategy", ["fedit", "ravan", "flora"])
def test_real_training_stays_within_its_reach(
    strategy: str, uplink: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    table = copy.deepcopy(recipe_table)
    table["train"] = {"steps": 3, "batch_size": 4, "learning_rate": 0.05, "weight_decay": 0.1}
    table["partition"] = {"kind": "iid", "clients": 3}
    table["federation"] = {"rounds": 3, "uplink": uplink, "min_clients": 3}
    table["strategy"] = {"name": strategy} | ({"heads": 2, "size": 4} if strategy == "ravan" else {})
    result = execute(check(table, "t"), tmp_path / "run")
    assert [len(record.clients) for record in result.records] == [3, 3, 3]


# --- beside the others


def altered(brief: Brief, strategy: str, change: Any) -> Reply:
    """`noisy`, with every tensor a function of (what was sent, what an honest client answers)."""
    reply = noisy(brief, strategy)
    if (sums := built(strategy).sums) is not None and brief.trip is not None:
        both = update_in(_KEPT[brief.client, brief.seed], brief.scalings)
        assert both is not None
        before = sums.measure(brief.trip, brief.round, question_in(brief.payload), both[0], both[0])
        tensors = {n: change(n, before[n], t).contiguous() for n, t in load(reply.payload).items()}
        return dataclasses.replace(reply, payload=save(tensors))
    before = load(pack(_begin(brief, strategy), brief.returns, blocks=brief.blocks))
    tensors = {n: change(n, before[n], t).contiguous() for n, t in load(reply.payload).items()}
    return dataclasses.replace(reply, payload=save(tensors))


def _begin(brief: Brief, strategy: str) -> Any:
    from florana.federation.messages import unpack
    from tests.federation import built

    return unpack(brief.payload, built(strategy).init(first_adapter()).adapter, {}, brief.scalings)[0]


def gauge(name: str, before: Tensor, after: Tensor) -> Tensor:
    """The same product, written as (1000 B, A / 1000)."""
    return after * {"B": 1000.0, "A": 0.001}.get(name[0], 1.0)


def times(factor: float) -> Any:
    return lambda name, before, after: before + factor * (after - before)


@pytest.mark.parametrize("strategy", [*STRATEGIES])
def test_an_update_times_forty_is_refused_under_every_strategy(strategy: str, tmp_path: Path) -> None:
    def answers(brief: Brief) -> list[Reply | Failure]:
        return [altered(brief, strategy, times(40)) if brief.client == victim else noisy(brief, strategy)]

    victim = "client-1"
    run(tmp_path / "run", strategy, 4, answers)
    records = [r for r in read_records(tmp_path / "run" / "rounds.jsonl") if victim in {*r.clients, *r.refused}]
    assert records
    for record in records:
        assert "times the median of this round" in record.refused[victim], record.round


def test_factors_written_otherwise_are_refused_though_their_product_is_honest(tmp_path: Path) -> None:
    def answers(brief: Brief) -> list[Reply | Failure]:
        return [altered(brief, "fedit", gauge) if brief.client == "client-1" else noisy(brief)]

    run(tmp_path / "run", "fedit", 2, answers)
    refused = [r.refused["client-1"] for r in read_records(tmp_path / "run" / "rounds.jsonl") if r.refused]
    assert refused
    assert all("changed its B by" in why for why in refused)


def test_a_count_of_rows_stays_what_it_was_for_the_whole_run_and_over_a_resume(tmp_path: Path) -> None:
    def lying(brief: Brief) -> list[Reply | Failure]:
        reply = noisy(brief)
        return [dataclasses.replace(reply, examples=10**9) if brief.round > 2 and brief.client == "client-3" else reply]

    run(tmp_path / "run", "fedit", 3, lying)
    run(tmp_path / "run", "fedit", 6, lying)  # resumed
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    known = {c for record in records[:2] for c in record.clients}
    later = [r for r in records[2:] if "client-3" in {*r.clients, *r.refused}]
    assert "client-3" in known
    assert later
    assert all(r.refused["client-3"] == "reports 1000000000 training examples, but has 40" for r in later)


# --- [robust] in a run


def small(recipe_table: dict[str, Any], **changes: Any) -> dict[str, Any]:
    table = copy.deepcopy(recipe_table)
    table["train"] = {"steps": 1, "batch_size": 4, "learning_rate": 0.01}
    table["partition"] = {"kind": "iid", "clients": 5}
    table["federation"] = {"rounds": 2, "min_clients": 5}
    table["evaluate"] = {"personal": "never"}
    table["strategy"] = {"name": "fedit"}
    return {**table, **changes}


ROBUST: list[dict[str, Any]] = [
    {"rule": "clip", "radius": 0.5},
    {"rule": "multi-krum", "hostile": 1},
    {"rule": "geometric-median"},
    {"rule": "trimmed", "hostile": 2},
]


@pytest.mark.parametrize("robust", ROBUST, ids=lambda table: str(table["rule"]))
def test_a_run_with_a_rule_says_in_its_journal_how_much_each_client_counted(
    robust: dict[str, Any], recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    result = execute(check(small(recipe_table, robust=robust), "t"), tmp_path / "run")
    for record in result.records:
        note = record.notes["robust"]
        assert note["rule"] == robust["rule"]
        assert len(note["counts"]) == 5
        assert sum(record.weights.values()) == pytest.approx(1)
        assert set(record.weights) == {client for client, count in note["counts"].items() if count > 0}
        if robust["rule"] == "clip":  # three of five at least are further off than half the median
            assert sum(count < 1 for count in note["counts"].values()) >= 3
        if robust["rule"] in ("multi-krum", "trimmed"):
            assert len(record.clients) == 5 - robust["hostile"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"robust": {"rule": "multi-krum"}}, "robust.hostile is missing"),
    ({"robust": {"rule": "median"}}, "'none', 'clip', 'multi-krum', 'geometric-median' or 'trimmed'"),
    ({"robust": {"rule": "clip", "hostile": 1}}, "hostile is of multi-krum and trimmed, and robust.rule is 'clip'"),
    ({"robust": {"radius": 2.0}}, "robust.radius is of clip, and robust.rule is 'none'"),
    ({"robust": {"rule": "multi-krum", "hostile": 2}}, "needs 7 updates in every round"),
    ({"robust": {"rule": "trimmed", "hostile": 3}}, "needs 7 updates in every round"),
    ({"robust": {"rule": "clip"}, "strategy": {"name": "local-only"}}, "does not go with robust.rule = 'clip'"),
    (
        {"robust": {"rule": "clip"}, "strategy": {"name": "ravan", "heads": 2, "size": 4, "heads_per_client": 1}},
        "'ravan' does not go with robust.rule",
    ),
    ({"federation": {"max_weight": 0.0}}, "greater than 0"),
    ({"federation": {"max_weight": 1.5}}, "less than or equal to 1"),
    ({"federation": {"max_change": 1.0}}, "greater than 1"),
    ({"robust": {"rule": "clip", "radius": math.inf}}, "finite"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_cannot_hold_is_refused_when_the_recipe_is_read(
    changes: dict[str, Any], said: str, recipe_table: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as caught:
        check(small(recipe_table, **changes), "t")
    assert said in str(caught.value)


def test_ravan_with_unlike_heads_by_rank_cannot_be_compared(recipe_table: dict[str, Any]) -> None:
    table = small(recipe_table, robust={"rule": "clip"}, strategy={"name": "ravan", "heads": 2, "size": 4})
    assert isinstance(check(table, "t"), Recipe)
    table["model"] = {**table["model"], "rank": 8, "client_ranks": [8, 4]}
    with pytest.raises(RecipeError, match=r"client_ranks does not go with robust\.rule = 'clip' under 'ravan'"):
        check(table, "t")
