"""The formats of the uplink: an oracle in numpy, bounds on the rounding, error feedback, the gate in front of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

from florana.aggregate.heterogeneous import leading
from florana.errors import InputError
from florana.federation import quantize
from florana.federation.error_feedback import FEEDBACK, outgoing, packed_size, uplink_error
from florana.federation.gate import Expected, RejectedUpdate, validate
from florana.federation.messages import Brief, Reply, pack, travelling
from florana.lora.factors import Adapter, LoraFactors, adapter_from_tensors
from florana.strategy.base import Payload, Pruning, work
from tests.federation import first_adapter

NARROW = ["bfloat16", "int8"]
KINDS = ["A", "B", "core", "extra"]


def draw(seed: int, *shape: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(adapter: Adapter, seed: int, size: float = 0.05) -> Adapter:
    """The adapter after a made-up training."""
    tensors = {
        name: t + draw(seed * 97 + i, *t.shape, size=size) for i, (name, t) in enumerate(adapter.tensors().items())
    }
    return adapter_from_tensors(tensors, adapter.scalings)


def brief_of(adapter: Adapter, form: Any, feedback: list[str] | None = None, **named: Any) -> Brief:
    given: dict[str, Any] = {"trains": ["A", "B"], "returns": ["A", "B"], **named}
    carried = KINDS if feedback is None else feedback
    return Brief(1, "c", 0, pack(adapter), False, scalings=adapter.scalings, uplink=form, feedback=carried, **given)


def oracle_int8(change: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], list[float], np.ndarray[Any, Any]]:
    """Whole numbers, scales and what they stand for, one number after the other."""
    flat = change.astype(np.float64).ravel()
    whole, scales = np.zeros(len(flat), np.int64), []
    for begin in range(0, len(flat), 64):
        block = flat[begin : begin + 64]
        scale = float(np.float32(np.max(np.abs(block)) / 127))
        scales.append(scale)
        for place, value in enumerate(block):
            whole[begin + place] = round(value / scale) if scale > 0 else 0  # Python rounds ties to even
    values = np.array([q * scales[i // 64] for i, q in enumerate(whole)])
    return whole.reshape(change.shape), scales, values.reshape(change.shape)


def oracle_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper half of float32's bits, rounded to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return (rounded << np.uint64(16)).astype(np.uint32).view(np.float32).astype(np.float64)


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))
SIZES = st.sampled_from([1e-30, 1e-6, 1.0, 3e4, 1e30])


@hypothesis.given(shape=SHAPES, seed=st.integers(0, 999), size=SIZES)
def test_int8_is_what_a_loop_in_float64_makes(shape: tuple[int, int], seed: int, size: float) -> None:
    change = draw(seed, *shape, size=size)
    whole, scale = quantize.quantized(change)
    expected, scales, values = oracle_int8(change.numpy())
    assert whole.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert whole.shape == change.shape
    assert whole.tolist() == expected.tolist()
    assert scale.tolist() == scales
    got = quantize.dequantized(whole, scale)
    assert got.dtype == torch.float64
    assert got.tolist() == values.tolist()
    spread = np.repeat(scales, 64)[: change.numel()].reshape(shape)
    assert np.all(np.abs(change.double().numpy() - values) <= spread / 2 * (1 + 1e-5))
    assert int(whole.int().abs().max()) == 127, "the scale is not taken from the largest"


@hypothesis.given(shape=SHAPES, seed=st.integers(0, 999), size=SIZES)
def test_bfloat16_rounds_to_nearest_even(shape: tuple[int, int], seed: int, size: float) -> None:
    change = draw(seed, *shape, size=size)
    zero = {"x": torch.zeros(shape)}
    up = quantize.written({"x": change}, zero, "bfloat16")
    got = quantize.read(up, zero, "bfloat16")["x"]
    assert up["x"].dtype == torch.bfloat16
    assert got.double().numpy().tolist() == oracle_bfloat16(change.numpy()).tolist()
    assert bool(((got.double() - change.double()).abs() <= 2.0**-8 * change.double().abs()).all())


def test_blocks_of_zeros_ties_and_the_shorter_last_block() -> None:
    change = torch.zeros(130)
    change[64], change[65], change[66] = 127.0, 0.5, 1.5  # a scale of 1: two ties
    change[129] = -0.25
    whole, scale = quantize.quantized(change)
    assert scale.tolist() == [0.0, 1.0, float(np.float32(0.25 / 127))]
    assert whole[64:67].tolist() == [127, 0, 2]
    assert whole[129] == -127
    assert int(whole.count_nonzero()) == 3
    assert quantize.quantized(torch.zeros(0, 3))[1].shape == (0,)
    tiny = torch.full((3,), 1e-45)  # its scale is zero in float32: nothing is sent, nothing divides by it
    assert quantize.dequantized(*quantize.quantized(tiny)).tolist() == [0.0] * 3


@pytest.mark.parametrize("form", NARROW)
def test_the_change_is_written_and_added_to_what_was_sent(form: Any) -> None:
    """Values of a thousand with changes of a thousandth: rounding the values themselves would lose all of it."""
    received = {"A/q": draw(1, 5, 40, size=1000.0)}
    change = draw(2, 5, 40, size=0.001)
    trained = {"A/q": received["A/q"] + change}
    got = quantize.read(quantize.written(trained, received, form), received, form)["A/q"]
    assert got.dtype == torch.float32
    assert float((got - trained["A/q"]).abs().max()) < 1.3e-4  # the last place of float32 there is 6e-5
    assert quantize.read(quantize.written(trained, received, "float32"), received, "float32")["A/q"].equal(
        trained["A/q"]
    )


def test_the_form_is_what_is_written_and_float32_is_todays_message() -> None:
    start = first_adapter()
    after = moved(start, 3)
    for form in ("float32", *NARROW):
        up = quantize.written(travelling(after, ["A", "B"]), travelling(start, ["A", "B"]), form)  # type: ignore[arg-type]
        like = quantize.form_of(travelling(start, ["A", "B"]), form)  # type: ignore[arg-type]
        assert {n: (t.shape, t.dtype) for n, t in up.items()} == {n: (t.shape, t.dtype) for n, t in like.items()}
        sent = outgoing(after, start, brief_of(start, form), {})
        assert packed_size(travelling(start, ["A", "B"]), form) == len(sent.content)  # type: ignore[arg-type]
    assert outgoing(after, start, brief_of(start, "float32"), {}).content == pack(after)
    assert outgoing(after, start, brief_of(start, "float32"), {}).feedback == {}
    with pytest.raises(InputError, match=r"as 'int4'(?s:.*)float32, bfloat16, int8"):
        outgoing(after, start, brief_of(start, "int4"), {})


def test_bytes_fall_to_a_half_and_to_little_more_than_a_quarter() -> None:
    pair = LoraFactors(draw(1, 768, 64), draw(2, 64, 768), 2.0)
    tensors = travelling(Adapter({"layer.0.q": pair}), ["A", "B"])
    whole, half, quarter = (packed_size(tensors, form) for form in ("float32", *NARROW))  # type: ignore[arg-type]
    assert half / whole == pytest.approx(0.5, abs=0.005)
    assert quarter / whole == pytest.approx((1 + 4 / 64) / 4, abs=0.01)


# error feedback


def sums_of(form: str, feedback: list[str], rounds: int, seed: int) -> tuple[float, float]:
    """After many rounds: the largest error of the sum of decoded updates, and the largest single step's size.

    The same small changes in every round, so that rounding them errs in the same direction each time.
    """
    start = first_adapter()
    memory: dict[str, torch.Tensor] = {}
    changes = {n: draw(seed + i, *t.shape, size=0.01).double() for i, (n, t) in enumerate(start.tensors().items())}
    missed = {n: torch.zeros_like(t) for n, t in changes.items()}
    step = 0.0
    for _ in range(rounds):
        after = adapter_from_tensors({n: (t + changes[n]).float() for n, t in start.tensors().items()}, start.scalings)
        out = outgoing(after, start, brief_of(start, form, feedback), memory)
        memory = dict(out.feedback)
        for name, tensor in out.arrives.tensors().items():
            missed[name] += tensor.double() - after.tensors()[name].double()
        encoded = load(out.content)
        for name in changes:  # the largest rounding that the format can make of this tensor
            if form == "int8":
                step = max(step, float(encoded[quantize.SCALE + name].max()) / 2)
            else:
                step = max(step, float(encoded[name].double().abs().max()) * 2.0**-8)
    return max(float(t.abs().max()) for t in missed.values()), step


@hypothesis.settings(max_examples=5)
@hypothesis.given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("form", NARROW)
def test_with_feedback_the_sum_stays_within_one_rounding_and_without_it_drifts(form: str, seed: int) -> None:
    with_it, step = sums_of(form, KINDS, 60, seed)
    without, _ = sums_of(form, [], 60, seed)
    assert with_it <= step * 1.01 + 1e-6
    assert without > 5 * step
    early, _ = sums_of(form, [], 6, seed)
    assert without == pytest.approx(10 * early, rel=0.05), "without feedback it grows with the rounds"


def test_only_the_kinds_that_are_carried_over_leave_something() -> None:
    start = first_adapter()
    out = outgoing(moved(start, 1), start, brief_of(start, "int8", ["extra"]), {})
    assert set(out.feedback) == {f"{FEEDBACK}extra/head.weight"}
    again = outgoing(moved(start, 1), start, brief_of(start, "int8", ["extra"]), out.feedback)
    assert load(again.content)["A/layer.0.q"].equal(load(out.content)["A/layer.0.q"])
    alone = outgoing(
        moved(start, 1),
        start,
        brief_of(start, "int8", returns=["A"]),
        {f"{FEEDBACK}B/layer.0.q": start.modules["layer.0.q"].B + 1},
    )
    assert alone.feedback[f"{FEEDBACK}B/layer.0.q"].equal(start.modules["layer.0.q"].B + 1), "kept for its own turn"
    assert "B/layer.0.q" not in load(alone.content)


def test_what_is_left_over_is_float32_and_what_the_server_lacks() -> None:
    start, memory = first_adapter(), {}
    for seed in (1, 2):
        after = moved(start, seed)
        out = outgoing(after, start, brief_of(start, "int8"), memory)
        update = validate(
            Reply("c", 1, 5, {}, out.content, 0.0), Expected(1, {"c": Payload(start)}, uplink="int8"), set()
        )
        for name, tensor in update.adapter.tensors().items():
            assert tensor.equal(out.arrives.tensors()[name]), "client and server do not agree"
            before = memory.get(FEEDBACK + name, torch.zeros_like(tensor))
            rest = after.tensors()[name].double() + before.double() - tensor.double()
            assert out.feedback[FEEDBACK + name].dtype == torch.float32
            assert torch.allclose(out.feedback[FEEDBACK + name].double(), rest, rtol=1e-6, atol=1e-12)
            assert bool(rest.any())
        memory = dict(out.feedback)


def test_blocks_of_a_core_keep_their_own_remainders() -> None:
    fixed = {"q": LoraFactors(draw(1, 7, 6), draw(2, 6, 9), 0.5)}
    start = Adapter(fixed, cores={"q": draw(3, 3, 2, 2)})
    after = Adapter(fixed, cores={"q": start.cores["q"] + draw(4, 3, 2, 2, size=0.01)})
    asked: dict[str, Any] = {"trains": ["core"], "returns": ["core"]}
    first = outgoing(after, start, brief_of(start, "int8", blocks=(2, 0), **asked), {})
    kept = first.feedback[f"{FEEDBACK}core/q"]
    assert kept.shape == (3, 2, 2)
    assert not kept[1].any()
    assert kept[0].any()
    assert kept[2].any()
    assert load(first.content)["core/q"].shape == (2, 2, 2)
    assert first.arrives.cores["q"][1].equal(after.cores["q"][1])
    assert torch.allclose(kept, after.cores["q"] - first.arrives.cores["q"], atol=1e-7), "blocks were exchanged"
    second = outgoing(after, start, brief_of(start, "int8", blocks=(1, 0), **asked), first.feedback)
    assert second.feedback[f"{FEEDBACK}core/q"][2].equal(kept[2])
    assert second.feedback[f"{FEEDBACK}core/q"][1].any()
    sent = Payload(start, work=work(["core"], up=["core"], down=["core"]), blocks=(2, 0))
    update = validate(Reply("c", 1, 5, {}, first.content, 0.0), Expected(1, {"c": sent}, uplink="int8"), set())
    assert update.adapter.cores["q"][[0, 2]].equal(first.arrives.cores["q"][[0, 2]])
    assert update.adapter.cores["q"][1].equal(start.cores["q"][1])


def test_a_pruned_client_drops_what_lies_beyond_its_rank() -> None:
    start = moved(first_adapter(), 5)
    whole = outgoing(moved(start, 6), start, brief_of(start, "int8"), {})
    pruned = leading(moved(start, 7), 1)
    brief = brief_of(start, "int8", pruning=Pruning(1, 0.1))
    out = outgoing(pruned, start, brief, whole.feedback)
    assert out.feedback[f"{FEEDBACK}A/layer.0.q"].shape == (1, 9)
    payload = Payload(start, pruning=brief.pruning)
    update = validate(Reply("c", 1, 5, {}, out.content, 0.0), Expected(1, {"c": payload}, uplink="int8"), set())
    assert update.adapter.modules["layer.0.q"].B.equal(out.arrives.modules["layer.0.q"].B)
    # refused after all: the server sends rank 2 again, and what is left fits
    back = outgoing(moved(start, 8), start, brief_of(start, "int8"), out.feedback)
    assert back.feedback[f"{FEEDBACK}A/layer.0.q"].shape == (2, 9)


def test_a_value_that_cannot_be_sent_does_not_spoil_later_rounds() -> None:
    start = first_adapter()
    broken = moved(start, 1)
    broken.modules["layer.0.q"].B[0, 0] = float("nan")
    for form in NARROW:
        out = outgoing(broken, start, brief_of(start, form), {})
        with pytest.raises(RejectedUpdate, match="not finite"):
            validate(Reply("c", 1, 5, {}, out.content, 0.0), Expected(1, {"c": Payload(start)}, uplink=form), set())  # type: ignore[arg-type]
        assert all(bool(torch.isfinite(t).all()) for t in out.feedback.values())
        later = outgoing(moved(start, 2), start, brief_of(start, form), out.feedback)
        assert validate(
            Reply("c", 1, 5, {}, later.content, 0.0), Expected(1, {"c": Payload(start)}, uplink=form), set()
        )  # type: ignore[arg-type]


# the error that is reported


def dense(adapter: Adapter) -> np.ndarray[Any, Any]:
    parts = []
    for name, pair in adapter.modules.items():
        B = pair.B.double().numpy()
        if name in adapter.cores:
            B = np.concatenate(
                [B[:, 2 * k : 2 * k + 2] @ c.double().numpy() for k, c in enumerate(adapter.cores[name])], 1
            )
        parts.append((pair.scaling * B @ pair.A.double().numpy()).ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("cores", [False, True])
def test_the_uplink_error_is_the_dense_one(cores: bool) -> None:
    modules = {"a": LoraFactors(draw(1, 7, 4), draw(2, 4, 9), 1.5), "b": LoraFactors(draw(3, 5, 4), draw(4, 4, 6), 0.5)}
    start = Adapter(modules, {"head": draw(5, 3)}, {n: draw(6, 2, 2, 2) for n in modules} if cores else {})
    trained, arrives = moved(start, 1), moved(moved(start, 1), 2, size=1e-4)
    want = np.linalg.norm(dense(arrives) - dense(trained)) / np.linalg.norm(dense(trained) - dense(start))
    assert uplink_error(arrives, trained, start) == pytest.approx(want, rel=1e-3 if cores else 1e-6)
    assert 1e-4 < want < 1e-2
    assert uplink_error(trained, trained, start) == 0
    assert uplink_error(trained, start, start) == 0
    if not cores:
        short = leading(trained, 2)  # a pruned client: measured against all that it was sent
        near = leading(arrives, 2)
        want = np.linalg.norm(dense(near) - dense(short)) / np.linalg.norm(dense(short) - dense(start))
        assert uplink_error(near, short, start) == pytest.approx(want, rel=1e-6)


# the gate


def tensors_of(form: str) -> dict[str, torch.Tensor]:
    start = first_adapter()
    return load(outgoing(moved(start, 1), start, brief_of(start, form), {}).content)


def answered(form: str, tensors: dict[str, torch.Tensor]) -> Any:
    reply = Reply("c", 1, 5, {}, save(tensors), 0.0)
    return validate(reply, Expected(1, {"c": Payload(first_adapter())}, uplink=form), set())  # type: ignore[arg-type]


A, SCALE = "A/layer.0.q", "scale/A/layer.0.q"
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("int8", {A: torch.zeros(2, 9)}, rf"'{A}' is torch\.float32, expected torch\.int8"),
    ("int8", {A: torch.zeros(2, 9, dtype=torch.uint8)}, r"is torch\.uint8, expected torch\.int8"),
    ("int8", {A: torch.full((2, 9), -128, dtype=torch.int8)}, "level below -127"),
    ("int8", {SCALE: torch.tensor([float("nan")])}, f"'{SCALE}' has 1 values that are not finite"),
    ("int8", {SCALE: torch.tensor([float("inf")])}, f"'{SCALE}' has 1 values that are not finite"),
    ("int8", {SCALE: torch.tensor([-1e-3])}, f"'{SCALE}' has a negative scale"),
    ("int8", {SCALE: None}, f"lacks the tensor '{SCALE}'"),
    ("int8", {A: None}, f"lacks the tensor '{A}'"),
    ("int8", {SCALE: torch.zeros(2)}, rf"'{SCALE}' has shape \(2,\), expected \(1,\)"),
    ("int8", {SCALE: torch.zeros(1, dtype=torch.float16)}, r"is torch\.float16, expected torch\.float32"),
    ("int8", {SCALE: torch.zeros(())}, rf"'{SCALE}' has shape \(\), expected \(1,\)"),
    ("int8", {"scale/A/layer.9.q": torch.zeros(1)}, r"foreign tensor 'scale/A/layer\.9\.q'"),
    ("int8", {A: torch.zeros(1, 9, dtype=torch.int8)}, r"has shape \(1, 9\), expected \(2, 9\)"),
    ("int8", {A: torch.full((2, 9), 127, dtype=torch.int8), SCALE: torch.tensor([3e38])}, "not finite"),
    ("int8", {"A/x": torch.zeros(400_000)}, r"sent \d+ bytes, the limit is"),
    ("bfloat16", {A: torch.zeros(2, 9)}, r"is torch\.float32, expected torch\.bfloat16"),
    ("bfloat16", {A: torch.zeros(2, 9, dtype=torch.float16)}, r"is torch\.float16, expected torch\.bfloat16"),
    ("bfloat16", {SCALE: torch.zeros(1)}, f"foreign tensor '{SCALE}'"),
    ("bfloat16", {A: torch.full((2, 9), float("nan"), dtype=torch.bfloat16)}, "18 values that are not finite"),
    ("bfloat16", {A: torch.full((2, 9), 3.3e38, dtype=torch.bfloat16)}, "overflows"),
    ("float32", {A: torch.zeros(2, 9, dtype=torch.bfloat16)}, r"is torch\.bfloat16, expected torch\.float32"),
    ("float32", {SCALE: torch.zeros(1)}, f"foreign tensor '{SCALE}'"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "says"), BAD, ids=range(len(BAD)))
def test_a_badly_encoded_reply_is_refused(form: str, change: dict[str, Any], says: str) -> None:
    good = tensors_of(form)
    assert answered(form, good)
    with pytest.raises(RejectedUpdate, match=says):
        answered(form, {name: t for name, t in (good | change).items() if t is not None})


@pytest.mark.parametrize(("asked", "sent"), [("float32", "int8"), ("int8", "float32"), ("bfloat16", "int8")])
def test_a_reply_in_another_format_than_the_one_asked_for_is_refused(asked: str, sent: str) -> None:
    with pytest.raises(RejectedUpdate):
        answered(asked, tensors_of(sent))


def test_the_limit_of_a_message_follows_its_format() -> None:
    big = LoraFactors(torch.zeros(2000, 8), torch.zeros(8, 2000), 1.0)
    payload, ballast = Payload(Adapter({"q": big})), {"A/x": torch.zeros(60_000)}
    for form, refused in (("float32", "foreign"), ("int8", "bytes, the limit is 133536")):  # 2 * 34000 + 65536
        reply = Reply("c", 1, 5, {}, save(ballast), 0.0)
        with pytest.raises(RejectedUpdate, match="lacks" if form == "float32" else refused):
            validate(reply, Expected(1, {"c": payload}, uplink=form), set())  # type: ignore[arg-type]


def test_a_brief_keeps_its_format_over_flower() -> None:
    briefs = pytest.importorskip("florana.flower.app.codec")
    brief = dataclasses.replace(brief_of(first_adapter(), "int8"), feedback=["extra"])
    frame = briefs.brief_frame(brief, "run", "word", "card")
    back = briefs.read_brief(type(frame)(frame.kind, frame.fields, frame.payload))
    assert back == brief
