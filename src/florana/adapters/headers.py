"""Which tensors an adapter folder holds, and where: from the headers of its weight files, before any value is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from florana.adapters.peft_config import read_json
from florana.adapters.safetensors_io import Place, read_header
from florana.errors import InputError

WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"

_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.weight)?$")


def read_headers(folder: Path) -> dict[str, Place]:
    """Key -> place, of one weight file or of all that an index names; the index must name each tensor's own file.

    Raises InputError where a file is missing or damaged, or holds what a partitioned model leaves in one process.
    """
    index = folder / INDEX
    if not index.exists():
        return _read_header(folder / WEIGHTS)
    table = read_json(index)
    owner = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(owner, dict) or not owner or not all(isinstance(name, str) for name in owner.values()):
        raise InputError(f"{index} has no 'weight_map' from tensors to files")
    shards = sorted(set(owner.values()))
    if not all(_SHARD.fullmatch(name) for name in shards):
        raise InputError(f"{index} names files outside its own folder, or no .safetensors files")
    places: dict[str, Place] = {}
    for shard in shards:
        for key, place in _read_header(folder / shard).items():
            if key in places:
                raise InputError(f"{place.path}: the tensor '{key}' stands in {places[key].path.name} too")
            if owner.get(key) != shard:
                raise InputError(f"{place.path}: the tensor '{key}' stands here, but {INDEX} says otherwise")
            places[key] = place
    for key in owner.keys() - places.keys():
        raise InputError(f"{folder / owner[key]} lacks the tensor '{key}', which {INDEX} places there")
    return places


def _read_header(path: Path) -> dict[str, Place]:
    if not path.is_file():
        raise InputError(f"{path} does not exist", fix="save the adapter as safetensors; .bin files are not read")
    places = read_header(path)
    for key, place in places.items():
        _require_whole(key, place)
    return places


def stripped(places: Mapping[str, Place], strip: Callable[[str], str]) -> dict[str, Place]:
    """The places under their keys without wrappers' names. Raises InputError where two become one."""
    result: dict[str, Place] = {}
    for key, place in places.items():
        plain = strip(key)
        if plain in result:
            raise InputError(
                f"{place.path}: the tensor '{key}' stands there twice, under the names of two wrappers",
                why=f"without them both are '{plain}'",
            )
        result[plain] = place
    return result


def _require_whole(key: str, place: Place) -> None:
    """Raise InputError where a tensor is what a partitioned model leaves of it in one process."""
    flat = bool(_FACTOR.search(key)) and len(place.shape) < 2
    if 0 in place.shape or flat:
        raise InputError(
            f"{place.path}: the tensor '{key}' has shape {place.shape}{': nothing is in it' if not flat else ''}",
            why="so a model partitioned over processes (DeepSpeed ZeRO-3, FSDP) is saved where its weights were not "
            "gathered first",
            fix="save again with the weights gathered (ZeRO-3: stage3_gather_16bit_weights_on_model_save, or "
            "zero_to_fp32.py on the checkpoint; FSDP: a full state dict)",
        )
