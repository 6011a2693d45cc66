"""The round loop and the gate: bad updates are refused with a reason, the round goes on, no quorum ends with code 4."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from florana.adapters.adapter_folder import read_adapter
from florana.errors import FederationError
from florana.federation.gate import Expected, RejectedUpdate, validate
from florana.federation.journal import read_records
from florana.federation.messages import Brief, Failure, Reply, pack
from florana.federation.sampling import sample
from florana.lora.factors import Adapter
from florana.strategy import STRATEGIES
from florana.strategy.base import Payload
from tests.federation import CLIENTS, VARIANTS, first_adapter, noisy, run


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Reply], Reply]:
    """A fault in the tensors of a reply."""

    def broken(reply: Reply) -> Reply:
        content = load(reply.payload)
        change(content)
        return dataclasses.replace(reply, payload=save({name: t.contiguous() for name, t in content.items()}))

    return broken


def one_of(content: dict[str, torch.Tensor], module: str) -> str:
    """The name of a tensor of that module: strategies differ in what goes up."""
    return min(name for name in content if name.endswith(module))


def put(module: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    """A fault in one tensor of a module."""
    return lambda content: content.update({one_of(content, module): change(content[one_of(content, module)])})


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda content: content[one_of(content, "layer.1.q")].view(-1).__setitem__(0, value)


FAULTS: dict[str, tuple[Callable[[Reply], Reply], str]] = {
    "one NaN": (tensors(fill(math.nan)), "not finite"),
    "one infinity": (tensors(fill(math.inf)), "not finite"),
    "overflowing product": (
        tensors(lambda c: c.update({n: torch.full_like(t, 3e38) for n, t in c.items() if n.endswith("layer.0.q")})),
        "overflows",
    ),
    "wrong rank": (
        tensors(put("layer.0.q", lambda t: torch.zeros([2 * n if n in (2, 4) else n for n in t.shape]))),
        "4",
    ),
    "broadcastable shape": (tensors(put("layer.0.q", lambda t: t.flatten()[:1].clone())), "has shape (1,)"),
    "transposed": (tensors(put("layer.0.q", lambda t: t.permute(*range(t.ndim)[::-1]).clone())), "has shape ("),
    "missing tensor": (tensors(lambda c: c.pop(one_of(c, "layer.1.q"))), "lacks the tensor '"),
    "foreign tensor": (tensors(lambda c: c.update({"A/evil": torch.zeros(2, 2)})), "foreign tensor 'A/evil'"),
    "wrong dtype": (tensors(lambda c: c.update({"head.w": c.pop("extra/head.weight").double()})), "lacks"),
    "half precision": (
        tensors(lambda c: c.update({"extra/head.weight": c["extra/head.weight"].half()})),
        "is torch.float16, expected torch.float32",
    ),
    "NaN in the head": (
        tensors(lambda c: c["extra/head.weight"].fill_(math.nan)),
        "'extra/head.weight' has 12 values that are not finite",
    ),
    "not safetensors": (lambda reply: dataclasses.replace(reply, payload=b"\x80\x04pickle"), "not a safetensors file"),
    "truncated": (lambda reply: dataclasses.replace(reply, payload=reply.payload[:-7]), "not a safetensors file"),
    "oversize": (lambda reply: dataclasses.replace(reply, payload=b"x" * 10**6), "the limit is"),
    "no examples": (lambda reply: dataclasses.replace(reply, examples=0), "reports 0 training examples"),
    "negative examples": (lambda reply: dataclasses.replace(reply, examples=-60), "reports -60"),
    "huge examples": (lambda reply: dataclasses.replace(reply, examples=10**18), "reports 1000000000000000000"),
    "NaN examples": (lambda reply: dataclasses.replace(reply, examples=math.nan), "reports nan"),  # type: ignore[arg-type]
    "true examples": (lambda reply: dataclasses.replace(reply, examples=True), "reports True"),
    "stale round": (lambda reply: dataclasses.replace(reply, round=reply.round - 1), "answers round"),
    "future round": (lambda reply: dataclasses.replace(reply, round=reply.round + 1), "answers round"),
    "NaN metric": (lambda reply: dataclasses.replace(reply, metrics={"train_loss": math.nan}), "metric"),
}


@pytest.mark.parametrize(
    ("strategy", "fault"),
    # ravan's core of two blocks of two has one shape either way round
    [(s, f) for s in (*STRATEGIES, *VARIANTS) for f in FAULTS if (s, f) != ("ravan", "transposed")],
)
def test_one_bad_client_is_refused_and_the_result_is_that_of_the_others(
    fault: str, strategy: str, tmp_path: Path
) -> None:
    """Under every strategy: the same bytes as a round in which that client failed to answer at all."""
    change, reason = FAULTS[fault]
    victim = sample(CLIENTS, 3, seed=7, round_=1)[1]

    def bad(brief: Brief) -> list[Reply | Failure]:
        return [change(noisy(brief, strategy))] if brief.client == victim else [noisy(brief, strategy)]

    def silent(brief: Brief) -> list[Reply | Failure]:
        return [Failure(victim, "away")] if brief.client == victim else [noisy(brief, strategy)]

    run(tmp_path / "bad", strategy, 1, bad)
    run(tmp_path / "silent", strategy, 1, silent)
    (record,) = read_records(tmp_path / "bad" / "rounds.jsonl")
    assert list(record.refused) == [victim]
    assert reason in record.refused[victim]
    assert victim not in record.clients
    assert math.isclose(sum(record.weights.values()), 1.0)
    assert adapter_bytes(tmp_path / "bad") == adapter_bytes(tmp_path / "silent")


def test_a_second_answer_and_a_strangers_are_refused(tmp_path: Path) -> None:
    def twice(brief: Brief) -> list[Reply | Failure]:
        stranger = dataclasses.replace(noisy(brief), client="mallory")
        return [noisy(brief), noisy(brief), stranger]

    run(tmp_path / "twice", "fedit", 1, twice)
    run(tmp_path / "once", "fedit", 1)
    (record,) = read_records(tmp_path / "twice" / "rounds.jsonl")
    assert record.refused["mallory"] == "was not asked in this round"
    assert "has already answered" in record.refused[record.clients[0]]
    assert adapter_bytes(tmp_path / "twice") == adapter_bytes(tmp_path / "once")


def test_the_order_of_arrival_does_not_change_a_bit(tmp_path: Path) -> None:
    held: list[Brief] = []

    def reversed_order(brief: Brief, strategy: str) -> list[Reply | Failure]:
        held.append(brief)
        if len(held) < 3:
            return []
        answers = [noisy(brief, strategy) for brief in reversed(held)]
        held.clear()
        return list(answers)

    for strategy in (*STRATEGIES, *VARIANTS):
        run(tmp_path / strategy / "a", strategy, 2)
        run(tmp_path / strategy / "b", strategy, 2, functools.partial(reversed_order, strategy=strategy))
        assert adapter_bytes(tmp_path / strategy / "a") == adapter_bytes(tmp_path / strategy / "b")
        first, second = (read_records(tmp_path / strategy / name / "rounds.jsonl") for name in ("a", "b"))
        for one, other in zip(first, second, strict=True):
            assert list(one.clients) == list(other.clients) == sorted(one.clients)
            loss = sum(one.weights[client] * (1 + int(client[-1])) for client in one.clients)
            assert one.train_loss == pytest.approx(loss)
            assert other.train_loss == one.train_loss


def test_no_usable_update_ends_with_code_four_and_the_last_adapter_stands(tmp_path: Path) -> None:
    def fails_later(brief: Brief) -> list[Reply | Failure]:
        return [noisy(brief)] if brief.round < 3 else [Failure(brief.client, "out of memory")]

    with pytest.raises(FederationError) as caught:
        run(tmp_path / "x", "best-rank", 5, fails_later)
    assert caught.value.exit_code == 4
    assert "round 3" in str(caught.value)
    assert "out of memory" in str(caught.value)
    run(tmp_path / "two", "best-rank", 2)
    assert adapter_bytes(tmp_path / "x") == adapter_bytes(tmp_path / "two")
    assert [r.round for r in read_records(tmp_path / "x" / "rounds.jsonl")] == [1, 2]


def test_fewer_than_the_minimum_is_no_round(tmp_path: Path) -> None:
    def one_only(brief: Brief) -> list[Reply | Failure]:
        chosen = sample(CLIENTS, 3, seed=7, round_=1)
        return [noisy(brief)] if brief.client == chosen[0] else []

    with pytest.raises(FederationError, match="needs 2"):
        run(tmp_path, "fedit", 1, one_only, minimum=2)
    assert read_records(tmp_path / "rounds.jsonl") == []


def test_bytes_are_those_really_sent_and_weights_are_the_shares(tmp_path: Path) -> None:
    sent: list[int] = []
    received: list[int] = []

    def counted(brief: Brief) -> list[Reply | Failure]:
        sent.append(len(brief.payload))
        reply = noisy(brief)
        received.append(len(reply.payload))
        return [reply]

    run(tmp_path, "flora-na", 1, counted)
    (record,) = read_records(tmp_path / "rounds.jsonl")
    assert record.bytes_down == sum(sent)
    assert record.bytes_up == sum(received)
    # rows 10, 20, 40: four sevenths of three clients are above one half
    assert record.examples == {"client-0": 10, "client-1": 20, "client-3": 40}
    assert record.weights == {
        c: pytest.approx(w) for c, w in (("client-0", 1 / 6), ("client-1", 1 / 3), ("client-3", 1 / 2))
    }
    assert record.notes["capped"] == {"client-3": pytest.approx(4 / 7)}


def test_errors_in_the_journal_are_ordered_as_the_theory_says(tmp_path: Path) -> None:
    """On one and the same first round: optimum = best-rank <= flora-na, lora-fair <= fedit."""
    error = {}
    for strategy in STRATEGIES:
        run(tmp_path / strategy, strategy, 1)
        (record,) = read_records(tmp_path / strategy / "rounds.jsonl")
        error[strategy] = record.error
    optimum = error["fedit"]["optimum"]
    assert error["best-rank"]["overall"] == pytest.approx(optimum, rel=1e-5)
    assert optimum <= error["flora-na"]["overall"] <= error["fedit"]["overall"]
    assert optimum > 0.01
    assert error["oracle"]["overall"] < 1e-6
    assert error["fedex-lora"]["overall"] < 1e-6
    assert optimum <= error["lora-fair"]["overall"] <= error["fedit"]["overall"]
    assert optimum <= error["fedrot"]["overall"]


def test_sampling_is_a_function_of_seed_and_round() -> None:
    draws = {tuple(sample(CLIENTS, 3, seed=1, round_=r)) for r in range(1, 30)}
    assert len(draws) > 5
    assert sample(CLIENTS, 3, 1, 4) == sample(list(reversed(CLIENTS)), 3, 1, 4)
    assert sample(CLIENTS, 9, 1, 4) == CLIENTS


def test_factors_whose_product_alone_overflows_are_refused() -> None:
    """Each tensor's own norm is fine, that of B A is not."""
    payload = Payload(first_adapter())
    huge = {n: torch.full_like(t, 1e25) for n, t in payload.adapter.tensors().items() if not n.startswith("extra")}
    reply = Reply("c", 1, 5, {}, save(huge | {"extra/head.weight": torch.zeros(3, 4)}), 0.0)
    with pytest.raises(RejectedUpdate, match=r"the product of module 'layer\.0\.q' overflows"):
        validate(reply, Expected(1, {"c": payload}), set())


def test_the_gate_knows_the_number_of_examples_where_the_server_does() -> None:
    brief = Brief(1, "client-1", 0, b"", False, ["A", "B"], ["A", "B"], first_adapter().scalings)
    reply = dataclasses.replace(_answer(brief), examples=11)
    expected = Expected(1, {"client-1": Payload(first_adapter())}, {"client-1": 20})
    with pytest.raises(RejectedUpdate, match="reports 11 training examples, but has 20"):
        validate(reply, expected, set())


def _answer(brief: Brief) -> Reply:
    return noisy(dataclasses.replace(brief, payload=pack(first_adapter())))


def adapter_bytes(folder: Path) -> bytes:
    read: Adapter = read_adapter(folder / "adapter")[0]  # it must be readable at all times
    assert read.modules
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()
