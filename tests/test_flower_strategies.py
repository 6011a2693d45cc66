"""florana's methods as Flower strategies: the arithmetic of the round loop, whatever arrives first."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra florana[flower] is not installed")

import torch
from flwr.app import Message, MetricRecord

import florana.flower
from florana.aggregate.error import measure
from florana.errors import RecipeError
from florana.federation.journal import Journal
from florana.federation.loop import run_rounds
from florana.federation.messages import Brief, Failure, Reply, unpack
from florana.federation.messages import pack as packed
from florana.flower import LoraStrategy, pack
from florana.flower.dropin.names import peft_name
from florana.flower.dropin.replies import FLORANA, RESIDUAL
from florana.lora.factors import Contribution, LoraFactors, kind_of
from florana.strategy import STRATEGIES
from florana.strategy.base import Outcome, State
from tests.federation import CARD, FakeEngine, federation, first_adapter
from tests.flower_fake import (
    NODES,
    SCALING,
    FakeGrid,
    answered,
    examples_of,
    failed,
    following,
    initial,
    noise,
    stock,
)
from tests.flower_methods import METHODS, PLAIN, bytes_of, made, rounds

pytestmark = pytest.mark.usefixtures("launched")


def test_every_method_is_exported_or_left_out_on_purpose() -> None:
    named = {made(name).method.name for name in METHODS}
    assert STRATEGIES.keys() - named == {"fed-sb", "ravan", "frlora", "fedask"}
    for left_out in ("fed-sb", "ravan", "frlora", "fedask"):
        with pytest.raises(RecipeError, match="cannot be dropped into a Flower app"):
            LoraStrategy(STRATEGIES[left_out](), scaling=1.0)
    with pytest.raises(RecipeError, match="asks each client twice"):
        LoraStrategy(STRATEGIES["best-rank"](source="sums"), scaling=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_the_round_loop_and_flower_give_the_same_bits(name: str, tmp_path: Path) -> None:
    """Three rounds, the same clients, both ways. The loop orders clients by name, Flower's side by content: so in each
    round the loop's first name plays the node that came first."""
    strategy, order = made(name), []

    def noted(state: State, parts: list[Contribution]) -> Outcome:
        order.append([int(part.client) for part in parts])
        return step(state, parts)

    step = strategy.method.step
    strategy.method = dataclasses.replace(strategy.method, step=noted)
    rounds(strategy, following, 3)
    assert sorted(order[0]) == sorted(NODES)
    method = STRATEGIES[strategy.method.name]()
    begun = method.init(first_adapter())

    def answer(brief: Brief) -> list[Reply | Failure]:
        node = order[brief.round - 1][int(brief.client)]
        adapter, _ = unpack(brief.payload, begun.adapter, {}, brief.scalings)
        moved = {
            n: t + noise(peft_name(n), t, node, brief.round) if kind_of(n) in {*brief.trains, "extra"} else t
            for n, t in adapter.tensors().items()
        }
        trained = dataclasses.replace(
            adapter,
            modules={m: LoraFactors(moved[f"B/{m}"], moved[f"A/{m}"], p.scaling) for m, p in adapter.modules.items()},
            extra={n: moved[f"extra/{n}"] for n in adapter.extra},
        )
        return [Reply(brief.client, brief.round, examples_of(node), {}, packed(trained, brief.returns), 0.0)]

    other, state = made(name), begun
    for number in (1, 2, 3):  # a folder for each: within one run a name keeps its number of rows
        fixed = dataclasses.replace(federation(number), clients=["0", "1", "2", "3"], per_round=4)
        (tmp_path / str(number)).mkdir()
        journal = Journal(tmp_path / str(number), CARD)
        state = run_rounds(method, state, FakeEngine(answer), fixed, journal, lambda event: None)
    other.state = state
    assert bytes_of(strategy) == bytes_of(other)
    assert strategy.state is not None
    assert strategy.state.round == 3


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_arrival_does_not_change_a_bit(name: str) -> None:
    one, other = made(name), made(name)
    rounds(one, following, 2)
    rounds(other, following, 2, backwards=True)
    assert bytes_of(one) == bytes_of(other)


@pytest.mark.parametrize("name", PLAIN)
def test_a_stock_client_gets_what_fedavg_sends_and_needs_nothing_else(name: str) -> None:
    one, other = made(name), made(name)
    grid = rounds(one, stock, 2)
    rounds(other, following, 2)
    assert {tuple(message.content) for message in grid.sent} == {("arrays", "config")}
    assert bytes_of(one) == bytes_of(other)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(PLAIN)))
def test_a_stock_client_is_refused_where_the_method_needs_more(name: str) -> None:
    """Never half of it: all are refused from the first round, and Flower keeps its arrays."""
    strategy = made(name)
    grid = FakeGrid(stock)
    result = strategy.start(grid, initial(), num_rounds=1)
    assert len(result.arrays) == 0
    assert all("florana.flower.receive" in why for why in strategy.refused.values())
    assert len(strategy.refused) == 4


def test_metrics_are_weighted_means_and_say_how_far_the_answer_fell() -> None:
    strategy = made("FedIT")
    parts: list[Contribution] = []
    step = strategy.method.step

    def noted(state: State, given: list[Contribution]) -> Outcome:
        parts.extend(given)
        return step(state, given)

    def bad(message: Message) -> list[Message]:
        (reply,) = following(message)
        if message.metadata.dst_node_id == NODES[0]:
            reply.content["metrics"]["own"] = 3.0
        return failed(message) if message.metadata.dst_node_id == NODES[3] else [reply]

    strategy.method = dataclasses.replace(strategy.method, step=noted)
    grid = FakeGrid(bad)
    result = strategy.start(grid, initial(), num_rounds=1)
    said = result.train_metrics_clientapp[1]
    total = sum(examples_of(node) for node in NODES[:3])
    assert said["train_loss"] == pytest.approx(sum(examples_of(n) * (0.5 + n) for n in NODES[:3]) / total)
    assert (said["florana-accepted"], said["florana-refused"]) == (3, 1)
    assert [part.weight for part in parts] == [examples_of(int(part.client)) / total for part in parts]
    expected = measure(parts, strategy.state.adapter)  # type: ignore[union-attr]
    assert said["florana-error"] == expected.error > said["florana-optimum"] == expected.optimum > 0
    assert "own" not in said
    assert made("FedSALora").method.facts.one_model is False


def test_evaluation_survives_bad_replies_and_carries_the_frozen_part() -> None:
    strategy = METHODS["Oracle"](scaling=SCALING, min_train_nodes=4, min_evaluate_nodes=4)

    def both(message: Message) -> list[Message]:
        if message.metadata.message_type == "train":
            return following(message)
        node = message.metadata.dst_node_id
        wrong = {11: math.nan, 7: 1.0, 5: 2.0, 3: 3.0}[node]
        count = 0 if node == 3 else examples_of(node)
        return [answered(message, {"metrics": MetricRecord({"accuracy": wrong, "num-examples": count})})]

    grid = FakeGrid(both)
    result = strategy.start(grid, initial(), num_rounds=1)
    seven, five = examples_of(7), examples_of(5)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx((seven + 2 * five) / (seven + five))
    evaluated = [message for message in grid.sent if message.metadata.message_type == "evaluate"]
    assert len(evaluated) == 4
    assert all(RESIDUAL in message.content and FLORANA in message.content for message in evaluated)
    assert strategy.aggregate_evaluate(1, []) is None


def test_a_method_with_a_frozen_part_gives_the_two_joined() -> None:
    """Oracle's arrays, as one adapter, are the true weighted sum: against a dense float64 sum."""
    strategy = made("Oracle")
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def noted(message: Message) -> list[Message]:
        (reply,) = following(message)
        kept[message.metadata.dst_node_id] = florana.flower.unpack(reply.content["arrays"])
        return [reply]

    result = strategy.start(FakeGrid(noted), initial(), num_rounds=1)
    total = sum(examples_of(node) for node in NODES)
    for module, pair in strategy.adapter.modules.items():
        A, B = peft_name(f"A/{module}"), peft_name(f"B/{module}")
        target = sum(examples_of(n) / total * SCALING * kept[n][B].double() @ kept[n][A].double() for n in NODES)
        joined = result.arrays.to_torch_state_dict()
        assert joined[A].shape[0] == pair.rank > 2
        assert torch.allclose(pair.scaling * joined[B].double() @ joined[A].double(), target, atol=1e-5)
    assert (
        result.train_metrics_clientapp[1]["florana-error"] < 1e-6 < result.train_metrics_clientapp[1]["florana-optimum"]
    )


def test_bfloat16_adapters_go_round() -> None:
    """In bfloat16 both ways, under every method: what comes back is bfloat16, and near the float32 result."""
    begun = {name: tensor.bfloat16() for name, tensor in initial().to_torch_state_dict().items()}
    for name in METHODS:
        strategy = made(name)
        strategy.start(FakeGrid(following), pack(begun), num_rounds=2)
        assert strategy.state is not None
        assert strategy.state.round == 2, (name, strategy.refused)
        assert {tensor.dtype for tensor in strategy.state.adapter.tensors().values()} == {torch.bfloat16}
        sent = FakeGrid(following)
        strategy.start(sent, pack(begun), num_rounds=1)
        assert sent.sent[0].content["arrays"][peft_name("A/layer.0.q")].dtype == "bfloat16"


@pytest.mark.parametrize("name", [n for n in METHODS if made(n).method.cut])
def test_nodes_of_unlike_ranks_get_and_send_their_own(name: str) -> None:
    ranks = {11: 1, 7: 2, 5: 2, 3: 1}
    strategy = METHODS[name](lora_alpha=3, client_ranks=ranks, min_train_nodes=4, fraction_evaluate=0.0)
    parts: list[Contribution] = []
    step = strategy.method.step

    def noted(state: State, given: list[Contribution]) -> Outcome:
        parts.extend(given)
        return step(state, given)

    strategy.method = dataclasses.replace(strategy.method, step=noted)
    grid = rounds(strategy, following, 2)
    for message in grid.sent:
        A = florana.flower.unpack(message.content["arrays"])[peft_name("A/layer.0.q")]
        assert A.shape == (ranks[message.metadata.dst_node_id], 9)
    assert strategy.refused == {}
    assert {(part.adapter.modules["layer.0.q"].rank, part.adapter.modules["layer.0.q"].scaling) for part in parts} == {
        (1, 3.0),
        (2, 1.5),
    }
    assert strategy.state.adapter.modules["layer.0.q"].rank == 2
