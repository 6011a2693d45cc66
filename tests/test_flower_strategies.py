"""florana's methods as Flower strategies: the arithmetic of the round loop, and no bad reply in any aggregate."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra florana[flower] is not installed")

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

import florana.flower
from florana.aggregate.error import measure
from florana.errors import InputError, RecipeError
from florana.factors import Adapter, Contribution, LoraFactors, Update, kind_of
from florana.federation.gate import oversized
from florana.federation.journal import Journal
from florana.federation.loop import by_examples, run_rounds
from florana.federation.messages import Brief, Failure, Reply, unpack
from florana.federation.messages import pack as packed
from florana.flower import LoraStrategy, pack
from florana.flower.answers import FLORANA, RESIDUAL
from florana.flower.names import peft_name
from florana.strategy import STRATEGIES
from florana.strategy.base import Outcome, Payload, State
from tests.federation import CARD, FakeEngine, federation, first_adapter
from tests.flower_fake import (
    NODES,
    SCALING,
    FakeGrid,
    answered,
    examples_of,
    failed,
    following,
    identify,
    initial,
    metrics,
    noise,
    stock,
)

METHODS = {name: getattr(florana.flower, name) for name in florana.flower.__all__ if name[0].isupper()}
del METHODS["LoraStrategy"]
PLAIN = ["FedIT", "FloraNA", "BestRank", "FlexLora", "HetLora", "LoraFair", "FedRot"]
Answer = Callable[[Message], list[Message]]


@pytest.fixture(autouse=True)
def _launched() -> Iterator[None]:
    """What Flower's launcher does before an app runs; without Flower's log, a page per round."""
    identify()
    flower = logging.getLogger("flwr")
    level = flower.level
    flower.setLevel(logging.ERROR)
    yield
    flower.setLevel(level)


def made(name: str, **options: object) -> LoraStrategy:
    strategy = METHODS[name](scaling=SCALING, min_train_nodes=4, min_evaluate_nodes=0, fraction_evaluate=0.0, **options)
    assert isinstance(strategy, Strategy)
    return strategy


def rounds(strategy: LoraStrategy, answer: Answer, count: int = 1, backwards: bool = False) -> FakeGrid:
    """Flower's own loop over a fake grid."""
    grid = FakeGrid(answer, backwards=backwards)
    strategy.start(grid, initial(), num_rounds=count)
    return grid


def bytes_of(strategy: LoraStrategy) -> dict[str, bytes]:
    """Everything the method knows, bit by bit."""
    state = strategy.state
    assert state is not None
    tensors = {f"adapter/{n}": t for n, t in state.adapter.tensors().items()} | dict(state.memory)
    if state.residual is not None:
        tensors |= {f"residual/{n}": t for n, t in state.residual.tensors().items()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_every_method_is_exported_or_left_out_on_purpose() -> None:
    named = {made(name).method.name for name in METHODS}
    assert STRATEGIES.keys() - named == {"fed-sb", "ravan", "frlora"}
    for left_out in ("fed-sb", "ravan", "frlora"):
        with pytest.raises(RecipeError, match="cannot be dropped into a Flower app"):
            LoraStrategy(STRATEGIES[left_out](), scaling=1.0)


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

    fixed = dataclasses.replace(federation(3), clients=["0", "1", "2", "3"], per_round=4)
    other = made(name)
    other.state = run_rounds(method, begun, FakeEngine(answer), fixed, Journal(tmp_path, CARD), lambda event: None)
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


def arrays(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Message], list[Message]]:
    """A fault in the tensors of a reply."""

    def broken(message: Message) -> list[Message]:
        (reply,) = following(message)
        content = florana.flower.unpack(reply.content["arrays"])
        change(content)
        reply.content["arrays"] = ArrayRecord(content)
        return [reply]

    return broken


def first(content: dict[str, torch.Tensor], module: str = "layer.1.q") -> str:
    return min(name for name in content if module in name)


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda content: content[first(content)].view(-1).__setitem__(0, value)


def put(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda content: content.update({first(content): change(content[first(content)])})


def number(key: str, value: float) -> Callable[[Message], list[Message]]:
    def broken(message: Message) -> list[Message]:
        (reply,) = following(message)
        reply.content["metrics"][key] = value
        return [reply]

    return broken


def other_round(message: Message) -> list[Message]:
    (reply,) = following(message)
    reply.metadata.group_id = str(int(reply.metadata.group_id) - 1)
    return [reply]


def heavy(message: Message) -> list[Message]:
    (reply,) = following(message)
    good = reply.content["arrays"]
    key = min(good)
    bad = Array(good[key].dtype, good[key].shape, good[key].stype, good[key].data + b"\0" * 100_000)
    reply.content["arrays"] = ArrayRecord({**good, key: bad})
    return [reply]


def without(key: str) -> Callable[[Message], list[Message]]:
    def broken(message: Message) -> list[Message]:
        (reply,) = following(message)
        del reply.content[key]
        return [reply]

    return broken


def stranger(message: Message) -> list[Message]:
    reply = following(message)[0]
    reply.metadata.__dict__["_src_node_id"] = 999
    return [reply]


FAULTS: dict[str, tuple[Callable[[Message], list[Message]], str]] = {
    "one NaN": (arrays(fill(math.nan)), "1 values that are not finite"),
    "one infinity": (arrays(fill(-math.inf)), "1 values that are not finite"),
    "x 1e6": (arrays(lambda c: [t.mul_(1e6) for t in c.values()]), "times the median of this round"),
    "overflow": (arrays(lambda c: [t.fill_(3e38) for n, t in c.items() if "layer.0" in n]), "overflows"),
    "wrong rank": (arrays(put(lambda t: torch.zeros([4 if n == 2 else n for n in t.shape]))), "has shape ("),
    "broadcastable shape": (arrays(put(lambda t: t.flatten()[:1].clone())), "has shape (1,)"),
    "transposed": (arrays(put(lambda t: t.T.clone())), "has shape ("),
    "half precision": (arrays(put(lambda t: t.half())), "is torch.float16, expected torch.float32"),
    "missing module": (arrays(lambda c: [c.pop(n) for n in list(c) if "layer.1" in n]), "lacks the tensor '"),
    "foreign module": (arrays(lambda c: c.update({peft_name("A/evil"): torch.ones(2, 2)})), "foreign tensor '"),
    "no examples": (number("num-examples", 0), "reports 0 training examples"),
    "negative examples": (number("num-examples", -60), "reports -60"),
    "huge examples": (number("num-examples", 10**18), "reports 1000000000000000000"),
    "NaN examples": (number("num-examples", math.nan), "reports nan"),
    "half an example": (number("num-examples", 0.5), "reports 0.5"),
    "NaN metric": (number("train_loss", math.nan), "metric 'train_loss' is not finite"),
    "wrong round": (other_round, "answers round 0, but round 1 is running"),
    "oversize": (heavy, "the limit is"),
    "no arrays": (without("arrays"), "brings 0 ArrayRecords"),
    "no metrics": (without("metrics"), "and 0 MetricRecords"),
    "an error": (failed, "out of memory"),
    "silence": (lambda message: [], "did not answer"),
    "another's name": (stranger, "did not answer"),
}


VICTIM = NODES[1]


def is_victims_first(message: Message) -> bool:
    return message.metadata.dst_node_id == VICTIM and message.metadata.group_id == "1"


@functools.cache
def without_the_victim(name: str) -> dict[str, bytes]:
    """What two rounds give in whose first one that client failed."""
    strategy = made(name)
    rounds(strategy, lambda message: failed(message) if is_victims_first(message) else following(message), 2)
    return bytes_of(strategy)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", METHODS)
def test_one_bad_client_is_refused_and_the_result_is_that_of_the_others(name: str, fault: str) -> None:
    """The same bits as if that client had failed to answer at all; the next round goes on with all four."""
    change, reason = FAULTS[fault]
    strategy, refused = made(name), {}

    def bad(message: Message) -> list[Message]:
        if message.metadata.group_id == "2":
            refused.update(strategy.refused)  # of round 1
        return change(message) if is_victims_first(message) else following(message)

    rounds(strategy, bad, 2)
    assert refused.keys() - {"999"} == {str(VICTIM)}
    assert reason in refused[str(VICTIM)]
    assert strategy.refused == {}
    assert bytes_of(strategy) == without_the_victim(name)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_answer_counts_once(name: str) -> None:
    def twice(message: Message) -> list[Message]:
        again = number("train_loss", 9.0)(message)
        return [*following(message), *again]

    one, other = made(name), made(name)
    rounds(one, twice)
    rounds(other, following)
    assert all("already answered" in why for why in one.refused.values())
    assert bytes_of(one) == bytes_of(other)


def test_a_round_is_answered_once() -> None:
    """A thousand replays, of the round just done and of the one before: none is counted."""
    strategy, answers = made("FloraNA"), []

    def noted(message: Message) -> list[Message]:
        answers.append(following(message)[0])
        return answers[-1:]

    grid = rounds(strategy, noted, 2)
    before = bytes_of(strategy)
    for _ in range(1000 // len(answers)):
        assert strategy.aggregate_train(2, answers) == (None, None)
    assert set(strategy.refused.values()) == {"was not asked in this round"}
    assert bytes_of(strategy) == before
    list(strategy.configure_train(3, strategy._current, ConfigRecord({}), grid))
    assert strategy.aggregate_train(3, answers) == (None, None)
    assert {why.partition(",")[0] for why in strategy.refused.values()} <= {"answers round 1", "answers round 2"}
    assert bytes_of(strategy) == before


def test_nothing_usable_leaves_the_arrays_and_the_next_round_goes_on() -> None:
    def fails_first(message: Message) -> list[Message]:
        return failed(message) if message.metadata.group_id == "1" else following(message)

    strategy = made("RoLora")
    result = strategy.start(FakeGrid(fails_first), initial(), num_rounds=2)
    assert list(result.train_metrics_clientapp) == [2]
    assert strategy.state is not None
    assert strategy.state.round == 1  # so the next one trains A, as after one good round
    once = made("RoLora")
    rounds(once, fails_first, 1)
    assert once.state is not None
    assert once.state.round == 0
    assert once.aggregate_train(1, []) == (None, None)


def test_a_step_that_fails_or_overflows_leaves_the_adapter_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    strategy = made("FedIT")

    def overflowing(state: State, parts: list[Contribution]) -> Outcome:
        pairs = {n: LoraFactors(p.B + math.inf, p.A, p.scaling) for n, p in state.adapter.modules.items()}
        return Outcome(State(1, Adapter(pairs, state.adapter.extra)))

    strategy.method = dataclasses.replace(strategy.method, step=overflowing)
    rounds(strategy, following)
    assert strategy.state is not None
    assert strategy.state.round == 0
    assert "the aggregated tensor 'B/layer.0.q' is not finite" in caplog.text


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


def test_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match="client_ranks does not go with 'fedit'"):
        made("FedIT", client_ranks={})
    for rank in (0, 3, None, 1.0, True):
        with pytest.raises(RecipeError, match="client_ranks gives node"):
            rounds(made("HetLora", client_ranks=lambda node, rank=rank: rank), following)


def test_fedavgs_arguments_mean_what_they_mean_there() -> None:
    keys = {"arrayrecord_key": "w", "configrecord_key": "c", "weighted_by_key": "n"}

    def answer(message: Message) -> list[Message]:
        assert set(message.content) == {"w", "c"}
        reported = MetricRecord({"n": float(examples_of(message.metadata.dst_node_id))})
        return [answered(message, {"w": message.content["w"], "m": reported})]

    strategy = METHODS["FedIT"](
        scaling=1.0, fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.0, min_available_nodes=3, **keys,
        train_metrics_aggr_fn=lambda contents, key: MetricRecord({"seen": len(contents), "key": len(key)}),
    )  # fmt: skip
    grid = FakeGrid(answer)
    result = strategy.start(grid, initial(), num_rounds=1)
    assert len(grid.sent) == 2
    assert (result.train_metrics_clientapp[1]["seen"], result.train_metrics_clientapp[1]["key"]) == (2, 1)
    stock_strategy = FedAvg()
    for name in ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes",
                 "weighted_by_key", "arrayrecord_key", "configrecord_key", "train_metrics_aggr_fn",
                 "evaluate_metrics_aggr_fn"):  # fmt: skip
        assert getattr(METHODS["FloraNA"](scaling=1.0), name) == getattr(stock_strategy, name), name


def test_options_reach_the_method_and_wrong_ones_are_explained() -> None:
    def count(name: str, **options: object) -> int:
        strategy = made(name, **options)
        rounds(strategy, following)
        return max(pair.rank for pair in strategy.state.residual.modules.values())  # type: ignore[union-attr]

    assert count("FedExLora", residual_rank=1) == 1 < count("FedExLora")
    assert count("Flora", residual_rank=3) == 3
    assert count("BestRank", broadcast_rank=4) == 2
    one, other = made("FloraNA"), made("FloraNA", combine="updates", scope="model")
    rounds(one, following, 2)
    rounds(other, following, 2)
    assert bytes_of(one) != bytes_of(other)
    with pytest.raises(RecipeError, match=r"'strategy\.solver' is 'als2'"):
        made("FloraNA", solver="als2")
    with pytest.raises(RecipeError, match=r"FloraNA has no option 'solvr'\nfix: did you mean 'solver'\?"):
        made("FloraNA", solvr="als")
    with pytest.raises(RecipeError, match="give lora_alpha or scaling"):
        METHODS["FloraNA"]()
    with pytest.raises(RecipeError, match="outlier_factor is 1"):
        made("FedIT", outlier_factor=1)
    with pytest.raises(RecipeError, match="energy is 2"):
        made("Florist", energy=2.0)


def test_arrays_that_somebody_else_put_in_are_taken_or_refused() -> None:
    """Flower's wrappers (differential privacy) change the arrays between rounds."""
    grid = FakeGrid(following)
    for name in ("FloraNA", "Oracle"):
        strategy = made(name)
        rounds(strategy, following)
        other = {key: tensor + 1 for key, tensor in initial().to_torch_state_dict().items()}
        config = ConfigRecord({})
        if name == "Oracle":
            with pytest.raises(RecipeError, match="round 2 was given other arrays"):
                strategy.configure_train(2, ArrayRecord(other), config, grid)
            continue
        messages = list(strategy.configure_train(2, ArrayRecord(other), config, grid))
        sent = messages[0].content["arrays"].to_torch_state_dict()
        assert all(torch.equal(sent[key], tensor) for key, tensor in other.items())
        assert strategy.state is not None
        assert strategy.state.round == 1


def test_initial_arrays_that_are_no_adapter_are_refused() -> None:
    tensors = initial().to_torch_state_dict()
    for change, why in (
        (lambda t: {"head": torch.ones(2)}, "no LoRA factors"),
        (
            lambda t: t | {peft_name("A/layer.1.q"): torch.ones(3, 5), peft_name("B/layer.1.q"): torch.ones(8, 3)},
            "unlike",
        ),
        (lambda t: t | {"q.lora_magnitude_vector": torch.ones(2)}, "no rule for the tensor"),
        (lambda t: t | {peft_name("extra/head.weight"): torch.full((3, 4), math.nan)}, "12 values that are not finite"),
    ):
        with pytest.raises((InputError, RecipeError), match=why):
            made("FloraNA").start(FakeGrid(following), ArrayRecord(change(dict(tensors))), num_rounds=1)


def update(client: str, size: float) -> Update:
    adapter = Adapter({"q": LoraFactors(torch.full((2, 1), size), torch.ones(1, 2), 1.0)})
    return Update(client, 1, adapter, 1, {})


def test_only_beside_others_is_an_update_too_large() -> None:
    """The change counts, not the size; two cannot tell which of them is wrong; zero changes say nothing."""
    sent = {c: Payload(update(c, 5.0).adapter) for c in "abcd"}

    def wrong(*sizes: float) -> list[str]:
        return list(oversized([update(c, 5.0 + s) for c, s in zip("abcd", sizes, strict=False)], sent, 10.0))

    assert wrong(1.0, 1.0, 10.5) == ["c"]
    assert wrong(1.0, 1.0, 9.5) == []
    assert wrong(1.0, 100.0) == []
    assert wrong(0.0, 0.0, 100.0) == []
    assert wrong(1.0, 2.0, 100.0, 100.0) == ["c", "d"]
    assert by_examples([update("a", 1.0)]) == {"a": 1.0}


def loaded_by(statement: str, missing: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{missing}\n{statement}\nprint(*sorted(m.split('.')[0] for m in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_package_is_lazy_and_says_which_extra_is_missing() -> None:
    names = set(loaded_by("import florana.flower; dir(florana.flower)").stdout.split())
    assert "florana" in names
    assert not {"flwr", "torch", "numpy"} & names
    hidden = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'flwr' else find(n)"
    done = loaded_by("from florana.flower import FloraNA", hidden)
    assert done.returncode != 0
    assert "pip install 'florana[flower]'" in done.stderr
    assert set(florana.flower.__all__) == florana.flower._MODULE_OF.keys()
    with pytest.raises(AttributeError):
        _ = florana.flower.nothing
    assert RecordDict({"metrics": metrics(3)})  # the fakes speak Flower's own types
