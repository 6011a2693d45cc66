"""How the values of a client's update are written on the way up: float32, bfloat16 or int8 with a scale per block.

    float32     the trained values themselves                                     4 bytes per number
    bfloat16    d rounded to nearest, ties to even                                2 bytes per number
    int8        q = round(d / s), s = max |d| / 127 over each block of 64         1 + 4/64 bytes per number

The quantized formats write the change d = trained - received, in the place of the trained values: the server knows
exactly what it sent, and the change is much smaller. Everything stays one safetensors file: `A/<module>` in bfloat16;
or `A/<module>` in int8, in its own shape, beside `scale/A/<module>`, float32, one for each block of the flattened
tensor (the last block may be shorter). Block-wise scales as in Dettmers et al., "8-bit optimizers via block-wise
quantization" (arXiv 2110.02861), here with evenly spaced levels.

A scale in float16 would save 2/64 of a byte per number and cannot say less than 6e-8: changes of late rounds do reach
that. All arithmetic is float64 in between; nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["float32", "bfloat16", "int8"]

BLOCK = 64
"""Values that share a scale in int8."""

LEVELS = 127
"""The largest whole number that int8 writes; -128 is left out, so that both signs reach equally far."""

SCALE = "scale/"
"""What the name of a tensor of scales begins with."""


def quantized(change: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s) of one tensor: q = round(d / s), ties to even, s = max |d| / 127 over the block.

    Args:
        change: d, of any shape and floating-point type.

    Returns:
        q: int8, -127 to 127, in the shape of d. s: float32, (ceil(n / 64),); 0 for a block of zeros.

    So |d - s q| <= s / 2 in each block, to the rounding of s. A block with a value that is not finite gets a scale that
    is not finite, which the gate refuses.

    Examples:
        >>> q, s = quantized(torch.tensor([[0.5, -2.54], [1.27, 0.0]]))
        >>> q.tolist(), round(s.item(), 6)
        ([[25, -127], [64, 0]], 0.02)
    """
    count = change.numel()
    padding = -count % BLOCK
    rows = torch.nn.functional.pad(change.double().flatten(), (0, padding)).reshape(-1, BLOCK)  # (blocks, 64)
    scale = (rows.abs().amax(dim=1) / LEVELS).float()
    steps = torch.where(scale[:, None] > 0, rows / scale.double()[:, None], 0.0)
    whole = steps.nan_to_num(0.0, 0.0, 0.0).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return whole.flatten()[:count].reshape(change.shape), scale


def dequantized(whole: Tensor, scale: Tensor) -> Tensor:
    """s q in float64, in the shape of q: what `quantized` has kept of the tensor.

    Examples:
        >>> dequantized(torch.tensor([3, -1], dtype=torch.int8), torch.tensor([0.5])).tolist()
        [1.5, -0.5]
    """
    spread = scale.double().repeat_interleave(BLOCK)[: whole.numel()]
    return (whole.double().flatten() * spread).reshape(whole.shape)


@dataclass(frozen=True)
class _Coder:
    """One format: named changes to named tensors, back (float64), and the tensors' shapes and types (on `meta`)."""

    encode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    form: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _as_bfloat16(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: change.float().to(torch.bfloat16) for name, change in changes.items()}


def _from_bfloat16(encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in encoded.items()}


def _form_of_bfloat16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _meta(t.shape, torch.bfloat16) for name, t in tensors.items()}


def _as_int8(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    encoded: dict[str, Tensor] = {}
    for name, change in changes.items():
        encoded[name], encoded[SCALE + name] = quantized(change)
    return encoded


def _from_int8(encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: dequantized(t, encoded[SCALE + n]) for n, t in encoded.items() if not n.startswith(SCALE)}


def _form_of_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole = {name: _meta(t.shape, torch.int8) for name, t in tensors.items()}
    return whole | {
        SCALE + name: _meta(torch.Size([-(-t.numel() // BLOCK)]), torch.float32) for name, t in tensors.items()
    }


def _meta(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_NARROW: dict[str, _Coder] = {
    "bfloat16": _Coder(_as_bfloat16, _from_bfloat16, _form_of_bfloat16),
    "int8": _Coder(_as_int8, _from_int8, _form_of_int8),
}
FORMATS: tuple[str, ...] = ("float32", *_NARROW)


def written(trained: Mapping[str, Tensor], received: Mapping[str, Tensor], form: Format) -> dict[str, Tensor]:
    """The tensors that go up: the trained ones as they are, or the change from what was received in a quantized format.

    Args:
        trained: name -> values, float32 or wider.
        received: the same names and shapes, as the server sent them.
        form: the format of the quantized values.

    Examples:
        >>> up = written({"A/q": torch.ones(2, 3)}, {"A/q": torch.zeros(2, 3)}, "int8")
        >>> [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in up.items()]
        [('A/q', torch.int8, (2, 3)), ('scale/A/q', torch.float32, (1,))]
    """
    if form == "float32":
        return dict(trained)
    return _NARROW[form].encode({name: t.double() - received[name].double() for name, t in trained.items()})


def read(encoded: Mapping[str, Tensor], received: Mapping[str, Tensor], form: Format) -> dict[str, Tensor]:
    """What the server makes of the tensors that came: received + decoded change, summed in float64, rounded once.

    Args:
        encoded: as `written` gives them (see `form_of`).
        received: name -> what the client was sent.
        form: the format that the client was asked for.

    Returns:
        Name -> values in the type of what was sent.

    Examples:
        >>> sent = {"B/q": torch.full((2, 2), 0.5)}
        >>> read(written({"B/q": torch.full((2, 2), 0.75)}, sent, "bfloat16"), sent, "bfloat16")["B/q"][0].tolist()
        [0.75, 0.75]
    """
    if form == "float32":
        return dict(encoded)
    changes = _NARROW[form].decode(encoded)
    return {name: (received[name].double() + c).to(received[name].dtype) for name, c in changes.items()}


def form_of(tensors: Mapping[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Names, shapes and types of what `written` gives for tensors like these; no values (device `meta`) where
    quantized.

    Examples:
        >>> {name: tuple(t.shape) for name, t in form_of({"A/q": torch.ones(2, 100)}, "int8").items()}
        {'A/q': (2, 100), 'scale/A/q': (4,)}
    """
    return dict(tensors) if form == "float32" else _NARROW[form].form(tensors)
