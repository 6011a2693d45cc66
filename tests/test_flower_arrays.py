"""Adapters as Flower records: every bit survives, and a record that lies is refused before anything is made of it."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("flwr", reason="the extra florana[flower] is not installed")

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from florana.errors import InputError, RecipeError
from florana.flower.dropin.arrays import BITS, pack, tensor_of, unpack
from florana.flower.dropin.names import names_of, peft_name, scaling_rule
from florana.lora.factors import Adapter
from tests.federation import first_adapter

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    dtype=st.sampled_from(DTYPES),
    turned=st.booleans(),
)
def test_every_bit_comes_back(seed: int, shape: list[int], dtype: torch.dtype, turned: bool) -> None:
    """Over Flower's own (de)serialisation of an array, subnormals and minus zero included."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if tensor.numel() > 1:
        tensor.view(-1)[:2] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 2]).to(dtype)
    tensor = tensor.T if turned and tensor.ndim == 2 else tensor
    sent = pack({"q": tensor})["q"]
    came = Array.inflate(sent.deflate(), sent.children)
    back = unpack(ArrayRecord({"q": came}), like={"q": tensor})["q"]
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert bits(back) == bits(tensor)


def test_floats_are_what_flower_itself_writes_and_bfloat16_stops_a_stock_reader() -> None:
    """A stock app reads what it can read; what it cannot read must not become 16-bit integers."""
    plain = {"a": torch.randn(2, 3), "b": torch.randn(4).half()}
    assert {k: v.data for k, v in pack(plain).items()} == {k: v.data for k, v in ArrayRecord(plain).items()}
    with pytest.raises(TypeError, match="BFloat16"):
        ArrayRecord({"q": torch.ones(2, dtype=torch.bfloat16)})
    with pytest.raises(TypeError, match=r"florana\.bits"):
        pack({"q": torch.ones(2, dtype=torch.bfloat16)}).to_torch_state_dict()


def test_what_numpy_stores_turned_is_read_upright() -> None:
    turned = np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3))
    assert b"'fortran_order': True" in Array(turned).data
    assert torch.equal(tensor_of("q", Array(turned)), torch.arange(6.0).reshape(2, 3))


def test_integers_do_not_travel() -> None:
    with pytest.raises(InputError, match=r"'steps' is torch\.int64"):
        pack({"steps": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(InputError, match="is <i8, not floating-point"):
        unpack(ArrayRecord([np.ones(2, dtype=np.int64)]))


def changed(**parts: object) -> Array:
    good = Array(np.ones((2, 3), dtype=np.float32))
    fields = {"dtype": good.dtype, "shape": good.shape, "stype": good.stype, "data": good.data} | parts
    return Array(**fields)  # type: ignore[arg-type]


GOOD = changed().data
LIES = {
    "another shape": changed(shape=(3, 2)),
    "cut": changed(data=GOOD[:-1]),
    "longer": changed(data=GOOD + b"\0"),
    "no header": changed(data=b""),
    "pickle": changed(data=b"\x80\x04pickle"),
    "object type": changed(data=GOOD.replace(b"'<f4'", b"'|O8'")),
    "big endian": changed(data=GOOD.replace(b"'<f4'", b"'>f4'")),
    "huge": changed(data=GOOD.replace(b"(2, 3), }          ", b"(2000000, 3000000)}"), shape=(2_000_000, 3_000_000)),
    "code in the header": changed(data=GOOD.replace(b"(2, 3)", b"(1+1,)")),
    "unknown type": changed(stype="pickle"),
    "bits of nothing": changed(stype=BITS),
    "bits of another length": changed(stype=BITS, dtype="bfloat16", data=b"\0" * 11),
    "bits of a negative shape": changed(stype=BITS, dtype="bfloat16", data=b"\0" * 12, shape=(-2, -3)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_lies_is_refused(lie: str) -> None:
    with pytest.raises(InputError, match="tensor 'q'"):
        unpack(ArrayRecord({"q": LIES[lie]}))


def test_damaged_bytes_are_refused_or_are_numbers() -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            tensor = unpack(ArrayRecord({"q": changed(data=bytes(data))}))["q"]
        except InputError:
            refused += 1
        else:
            assert tensor.shape == (2, 3)
            assert bool(torch.isfinite(tensor).all())
    assert 500 < refused < 2000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="1 values that are not finite"):
        unpack(pack({"q": torch.tensor([1.0, value], dtype=dtype)}))


def test_what_was_expected_is_held_against_what_came() -> None:
    record = pack({"a": torch.ones(2, 3)})
    for like, why in (
        ({"a": torch.ones(2, 3), "b": torch.ones(1)}, "lacks the tensor 'b'"),
        ({}, "foreign tensor 'a'"),
        ({"a": torch.ones(1, 3)}, r"has shape \(2, 3\), expected \(1, 3\)"),
        ({"a": torch.ones(2, 3).half()}, r"is torch\.float32, expected torch\.float16"),
    ):
        with pytest.raises(InputError, match=why):
            unpack(record, like)


def test_an_adapter_travels_under_pefts_names_and_comes_back() -> None:
    adapter = first_adapter()
    record = pack(adapter)
    assert "base_model.model.layer.0.q.lora_A.weight" in record
    assert "base_model.model.head.weight" in record
    back = names_of(record).adapter(unpack(record), lambda module, rank: 3 / rank)
    assert back.scalings == adapter.scalings == {"layer.0.q": 1.5, "layer.1.q": 1.5}
    assert all(torch.equal(t, back.tensors()[n]) for n, t in adapter.tensors().items())
    with pytest.raises(InputError, match="cores"):
        pack(Adapter(adapter.modules, cores={"layer.0.q": torch.ones(1, 2, 2)}))


def test_names_that_are_no_plain_lora_are_refused() -> None:
    pair = [peft_name("A/q"), peft_name("B/q")]
    for extra, why in (
        ("q.lora_magnitude_vector", "no rule for the tensor"),
        ("q.lora_B.bias", "no rule for the tensor"),
        ("q.lora_A.default.weight", "stands in the record twice"),
    ):
        with pytest.raises(InputError, match=why):
            names_of([*pair, extra])
    with pytest.raises(InputError, match="no LoRA factors"):
        names_of(["head.weight"])
    with pytest.raises(InputError, match="module 'q' has a factor A and no B"):
        names_of(pair[:1]).adapter({pair[0]: torch.ones(2, 3)}, lambda module, rank: 1.0)
    table = {"e.lora_embedding_A": torch.ones(2, 9), "e.lora_embedding_B": torch.ones(5, 2)}
    assert names_of(table).adapter(table, lambda module, rank: 1.0).modules["e"].shape == (5, 9)


def test_the_scaling_follows_pefts_rules_and_is_never_guessed() -> None:
    assert scaling_rule(16, False, None)("q", 8) == 2.0
    assert scaling_rule(16, True, None)("q", 4) == 8.0
    assert scaling_rule(None, False, 0.5)("q", 4) == 0.5
    table = {"q": 2.0, "base_model.model.v": 3.0}
    assert [scaling_rule(None, False, table)(m, 4) for m in ("q", "v")] == [2.0, 3.0]
    with pytest.raises(RecipeError, match="no number for the module 'k'"):
        scaling_rule(None, False, table)("k", 4)
    for wrong in ((None, False, None), (16, False, 2.0), (None, True, 2.0), (0, False, None), (None, False, {"q": -1})):
        with pytest.raises(RecipeError):
            scaling_rule(*wrong)  # type: ignore[arg-type]
