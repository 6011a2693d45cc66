"""Safetensors files tensor by tensor: the header read and judged once, values read from their place when asked for.

Between two reads nothing is open or mapped, so a thousand files need no thousand handles, and memory holds what was
asked for and nothing of the rest. The header is judged twice: by the safetensors library (sizes add up, no gaps, no
overlaps) and by this parse; where the two disagree about a tensor, the file is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from florana.errors import InputError

# In the order in which the library lays tensors out: wide types first, so that all values are aligned.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

HEADER_BYTES = 2**25
"""Of a file's header: some 300,000 tensors."""

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its file, the offset of its first byte there, its dtype and shape."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Place]:
    """Tensor name -> its place. Raises InputError where the file is damaged or holds what is not floating-point."""
    try:
        with path.open("rb") as file:
            if (said := int.from_bytes(file.read(8), "little")) > HEADER_BYTES:
                raise ValueError(f"its header says that it has {said} bytes, more than {HEADER_BYTES}")
        with safe_open(path, framework="pt") as stream:
            shapes = {key: tuple(stream.get_slice(key).get_shape()) for key in stream.keys()}  # noqa: SIM118
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=no_twins)
    except (OSError, SafetensorError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{path} cannot be read", why=" ".join(str(error).split())) from None
    header.pop("__metadata__", None)
    if header.keys() != shapes.keys():
        raise InputError(f"{path} cannot be read", why="its header names tensors in two ways")
    return {key: _place(path, key, entry, 8 + length, shapes[key]) for key, entry in header.items()}


def read_tensor(place: Place, key: str) -> Tensor:
    """The values. Raises InputError where they cannot be read any more, or are not all finite."""
    tensor = torch.empty(place.shape, dtype=place.dtype)
    room = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with place.path.open("rb", buffering=0) as stream:
            stream.seek(place.start)
            done = 0
            while done < len(room) and (count := stream.readinto(room[done:])):
                done += count
    except OSError as error:
        raise InputError(f"{place.path}: the tensor '{key}' cannot be read", why=str(error)) from None
    if done < len(room):
        raise InputError(f"{place.path}: the tensor '{key}' cannot be read", why="the file is shorter than it was")
    # The sum is one fast pass; it is not finite where an entry is not, or where finite entries are very large.
    if not math.isfinite(float(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{place.path}: the tensor '{key}' has values that are not finite (NaN or infinite)")
    return tensor


def map_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on a private memory map: pages are read when values are, and go when memory is short.

    Pages come one by one, without reading ahead: who goes through a thousand files module by module would else read all
    of each file for every module.

    Raises:
        InputError: the file is damaged, or holds what is not floating-point.
    """
    places = read_header(path)
    try:
        with path.open("rb") as stream:
            whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from None
    if hasattr(mmap, "MADV_RANDOM"):
        whole.madvise(mmap.MADV_RANDOM)
    return {
        key: torch.frombuffer(whole, dtype=place.dtype, count=math.prod(place.shape), offset=place.start).reshape(
            place.shape
        )
        for key, place in places.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, byte by byte what the library's `save` makes of them, without its two copies in memory."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise InputError(f"the tensor '{key}' is {tensor.dtype}, not floating-point of 16 bits or more")
    order = list(_NAMES)
    ordered = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: a table in which no key stands twice. Raises ValueError where one does."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{ascii(twin)[:60]} stands there twice")
    return table


def digest(path: Path) -> str:
    """The sha256 of a file, read in pieces. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read", why=os.strerror(error.errno or 0)) from None


def _place(path: Path, key: str, entry: Mapping[str, Any], base: int, shape: tuple[int, ...]) -> Place:
    if entry["dtype"] not in _DTYPES:
        raise InputError(
            f"{path}: the tensor '{key}' is {entry['dtype']}, not floating-point of 16 bits or more",
            why=f"florana reads {', '.join(_DTYPES)}",
        )
    if tuple(entry["shape"]) != shape:
        raise InputError(f"{path} cannot be read", why=f"its header gives '{key}' two shapes")
    return Place(path, base + int(entry["data_offsets"][0]), _DTYPES[entry["dtype"]], shape)
