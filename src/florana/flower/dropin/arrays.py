"""An adapter as Flower's ArrayRecord and back: bit for bit in every floating type, and judged before it is believed.

float32, float16 and float64 travel as Flower writes them (numpy's own format), so that an app which knows nothing of
florana reads them. numpy has no bfloat16: such a tensor travels as its bits, under a serialisation type of its own, at
which Flower's own `to_torch_state_dict` stops with an error instead of reading 16-bit integers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from florana.errors import InputError
from florana.flower.dropin.names import peft_name
from florana.lora.factors import Adapter

BITS = "florana.bits"
"""Serialisation type of a tensor that travels as little-endian 16-bit words; `Array.dtype` says what they mean."""

NUMPY = "numpy.ndarray"
_DTYPES = {"<f4": torch.float32, "<f2": torch.float16, "<f8": torch.float64}
# What numpy's save writes; nothing else is read, so nothing has to be evaluated.
_HEADER = re.compile(
    rb"\{'descr': '([<|>=\w]{2,8})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,200})\), \} *\n"
)
_MAGIC = b"\x93NUMPY\x01\x00"


def pack(tensors: Mapping[str, Tensor] | Adapter) -> ArrayRecord:
    """A PEFT state dict, or an Adapter under PEFT's names, as an ArrayRecord.

    Raises:
        InputError: a tensor is not floating-point of 16, 32 or 64 bits.

    Examples:
        >>> record = pack({"q.lora_A.weight": torch.ones(2, 3, dtype=torch.bfloat16)})
        >>> record["q.lora_A.weight"].dtype, unpack(record)["q.lora_A.weight"].dtype
        ('bfloat16', torch.bfloat16)
    """
    if isinstance(tensors, Adapter):
        if tensors.cores:
            raise InputError("an adapter with cores between fixed factors has no PEFT names")
        tensors = {peft_name(name): tensor for name, tensor in tensors.tensors().items()}
    return ArrayRecord({name: _packed(name, tensor) for name, tensor in tensors.items()})


def _packed(name: str, tensor: Tensor) -> Array:
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        words = plain.view(torch.int16).numpy().astype("<i2", copy=False)
        return Array(dtype="bfloat16", shape=tuple(plain.shape), stype=BITS, data=words.tobytes())
    if plain.dtype not in _DTYPES.values():
        raise InputError(
            f"the tensor '{name}' is {tensor.dtype}; an adapter travels in floating point of 16 to 64 bits"
        )
    return Array(plain.numpy())


def unpack(record: ArrayRecord, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of an ArrayRecord, by its own names. The record is untrusted.

    Args:
        record: what came; untrusted.
        like: what must come, by name: the same names, shapes and types and no others.

    Raises:
        InputError: an array is no floating-point array as numpy or `pack` writes it, its parts contradict one another,
            it holds a value that is not finite, or it does not agree with `like`.

    Examples:
        >>> unpack(pack({"q": torch.arange(3.0)}))["q"]
        tensor([0., 1., 2.])
    """
    if like is not None:
        for name in sorted(like.keys() - record.keys()):
            raise InputError(f"the record lacks the tensor '{name}'")
        for name in sorted(record.keys() - like.keys()):
            raise InputError(f"the record brings the foreign tensor '{name[:80]}'")
    tensors = {}
    for name, array in record.items():
        if like is not None and tuple(array.shape) != tuple(like[name].shape):
            raise InputError(f"tensor '{name}' has shape {tuple(array.shape)}, expected {tuple(like[name].shape)}")
        tensor = tensor_of(name, array)
        if like is not None and tensor.dtype != like[name].dtype:
            raise InputError(f"tensor '{name}' is {tensor.dtype}, expected {like[name].dtype}")
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(f"tensor '{name}' has {bad} values that are not finite (NaN or infinite)")
        tensors[name] = tensor
    return tensors


def size_of(record: ArrayRecord) -> int:
    """The bytes of a record's arrays and names, without reading a value."""
    return sum(len(name) + len(array.data) for name, array in record.items())


def tensor_of(name: str, array: Array) -> Tensor:
    """One array as a tensor, whatever its values. Memory is taken for the bytes that came, never for what they claim.

    Raises:
        InputError: it is no floating-point array as numpy or `pack` writes it, or its parts contradict one another.
    """
    shape, what = tuple(array.shape), f"tensor '{name[:80]}'"
    if array.stype == BITS:
        if array.dtype != "bfloat16" or any(n < 0 for n in shape) or len(array.data) != 2 * math.prod(shape):
            raise InputError(f"{what} cannot be read", why=f"{len(array.data)} bytes of {array.dtype[:20]} as {shape}")
        words = np.frombuffer(array.data, dtype="<i2").astype(np.int16)  # a copy: torch must own what it may write to
        return torch.from_numpy(words.reshape(shape)).view(torch.bfloat16)
    if array.stype != NUMPY:
        raise InputError(f"{what} cannot be read", why=f"its serialisation type is '{array.stype[:40]}'")
    data = array.data
    length = int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10 : 10 + length])
    if not data.startswith(_MAGIC) or header is None:
        raise InputError(f"{what} cannot be read", why="its bytes are not what numpy writes")
    kind, fortran = header[1].decode(), header[2] == b"True"
    if kind not in _DTYPES:
        raise InputError(f"{what} is {kind}, not floating-point of 16, 32 or 64 bits")
    declared = tuple(int(number) for number in header[3].replace(b" ", b"").split(b",") if number)
    size = math.prod(declared) * np.dtype(kind).itemsize
    if declared != shape or len(data) - 10 - length != size:
        raise InputError(
            f"{what} cannot be read",
            why=f"it says shape {shape}, its bytes {declared} with {len(data) - 10 - length} of {size} bytes",
        )
    flat = np.frombuffer(data, dtype=kind, offset=10 + length)
    values = flat.reshape(declared, order="F" if fortran else "C").astype(np.dtype(kind).newbyteorder("="), order="C")
    return torch.from_numpy(values)
