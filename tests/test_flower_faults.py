"""No bad reply in any aggregate of a drop-in strategy, and one bad client ends nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest

pytest.importorskip("flwr", reason="the extra florana[flower] is not installed")

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

import florana.flower
from florana.federation.gate import oversized
from florana.federation.weighting import by_examples
from florana.flower.dropin.names import peft_name
from florana.lora.factors import Adapter, Contribution, LoraFactors, Update
from florana.strategy.base import Outcome, Payload, State
from tests.flower_fake import (
    NODES,
    FakeGrid,
    failed,
    following,
    initial,
)
from tests.flower_methods import METHODS, bytes_of, made, rounds

pytestmark = pytest.mark.usefixtures("launched")


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
