"""PEFT adapter folders, read module by module: every tensor checked, nothing held longer than asked for.

Files are untrusted. The configuration decides rank and scaling of each module; the weights' header is compared with it
when the folder is opened, the values when they are read. Whatever changes a module's output in a way B @ A does not
say (DoRA and its kin) is refused by name. No pickle: `.bin` files are not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from florana.adapter_config import CONFIG, names, ranks_and_alphas, read_config, read_json
from florana.errors import InputError
from florana.factors import LoraFactors
from florana.tensor_files import Place, digest, read_header, read_tensor

WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
PREFIX = "base_model.model."

Kind = Literal["linear", "embedding"]

_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<letter>[AB])(?P<suffix>\.weight|\.bias)?$", re.S)


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter folder says beside its tensors; enough for PEFT to load it.

    Args:
        base_model: the folder or hub name of the base model.
        task_type: PEFT's name of the task (`SEQ_CLS`, `CAUSAL_LM`), or None.
        target_modules: the names PEFT matches modules by.
        modules_to_save: the modules trained whole.
        fan_in_fan_out: True where the base weight is stored (in x out), as in Conv1D.
        rslora: the scaling is alpha / sqrt(r).
        embeddings: the adapted modules that are embeddings (their factors have other names in the file).
        lora_bias: the adapter holds a bias beside each B.
        dora: each module has a magnitude among the tensors trained whole, `<module>.lora_magnitude_vector`. Written,
            never read: such an update is no plain product.
    """

    base_model: str
    task_type: str | None
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    rslora: bool = False
    embeddings: tuple[str, ...] = ()
    lora_bias: bool = False
    dora: bool = False


@dataclass(frozen=True)
class Module:
    """Where one module's factors lie: its kind, rank, scaling and (out, in), and the keys of A, B and the bias."""

    kind: Kind
    rank: int
    scaling: float
    shape: tuple[int, int]
    keys: Mapping[str, str]


@dataclass(frozen=True)
class AdapterReader:
    """An opened adapter folder: what it holds is known, no value has been read, no file is open.

    Args:
        folder: where. card: what the configuration says.
        modules: module name -> its entry, sorted. extra: name -> key of the tensors trained whole, sorted.
        places: key -> where its values lie.
    """

    folder: Path
    card: AdapterCard
    modules: Mapping[str, Module]
    extra: Mapping[str, str]
    places: Mapping[str, Place]

    def pair(self, module: str) -> LoraFactors:
        """One module's factors. Raises InputError where a value is not finite or the file changed underneath."""
        entry = self.modules[module]
        A, B = self.tensor(entry.keys["A"]), self.tensor(entry.keys["B"])
        return LoraFactors(B=B, A=A, scaling=entry.scaling)

    def bias(self, module: str) -> Tensor | None:
        """The bias beside B (out,), to be multiplied by the scaling; None where there is none."""
        key = self.modules[module].keys.get("bias")
        return None if key is None else self.tensor(key)

    def tensor(self, key: str) -> Tensor:
        """One tensor by its key in the file."""
        return read_tensor(self.places[key], key)

    def dtype(self, module: str) -> torch.dtype:
        """The type in which a module's factors are stored, without reading them."""
        return self.places[self.modules[module].keys["A"]].dtype

    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({place.path for place in self.places.values()})

    def sha256(self) -> dict[str, str]:
        """File name -> digest, of the configuration and all weight files."""
        return {path.name: digest(path) for path in (self.folder / CONFIG, *self.files())}


def open_adapter(folder: Path) -> AdapterReader:
    """Open a PEFT LoRA folder: configuration and header checked against each other.

    Raises:
        InputError: the folder is not a LoRA adapter that can be represented exactly; the message says why.
    """
    config = read_config(folder)
    places = _read_headers(folder)
    found: dict[str, dict[str, str]] = {}
    kinds: dict[str, Kind] = {}
    extra: dict[str, str] = {}
    for key in sorted(places):
        if not key.startswith(PREFIX):
            raise InputError(
                f"{places[key].path}: the tensor '{key}' does not start with '{PREFIX}'",
                why="this is not the layout PEFT writes",
            )
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        kind: Kind = "embedding" if match and match["kind"] else "linear"
        wanted = {"linear": ".weight", "embedding": None}[kind]
        if match and match["suffix"] == wanted:
            found.setdefault(match["module"], {})[match["letter"]] = key
            kinds[match["module"]] = kind
        elif match and match["letter"] == "B" and match["suffix"] == ".bias" and config.get("lora_bias"):
            found.setdefault(match["module"], {})["bias"] = key
        elif ".lora_" in name:
            raise InputError(
                f"{places[key].path}: no rule for the tensor '{key}'",
                why="only plain LoRA factors (lora_A, lora_B) are products B @ A",
            )
        elif not name:
            raise InputError(f"{places[key].path}: a tensor has no name after '{PREFIX}'")
        else:
            extra[name] = key
    if not found:
        raise InputError(f"{folder / WEIGHTS} holds no LoRA factors")
    stated = ranks_and_alphas(config, list(found), folder / CONFIG)
    rslora = bool(config.get("use_rslora"))
    modules = {
        name: _module(folder, name, kinds.get(name, "linear"), keys, places, stated[name], rslora)
        for name, keys in found.items()
    }
    return AdapterReader(folder, _card(config, kinds), dict(sorted(modules.items())), extra, places)


def _card(config: Mapping[str, Any], kinds: Mapping[str, Kind]) -> AdapterCard:
    return AdapterCard(
        base_model=config.get("base_model_name_or_path") or "",
        task_type=config.get("task_type"),
        target_modules=names(config.get("target_modules")),
        modules_to_save=names(config.get("modules_to_save")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        rslora=bool(config.get("use_rslora")),
        embeddings=tuple(sorted(name for name, kind in kinds.items() if kind == "embedding")),
        lora_bias=bool(config.get("lora_bias")),
    )


def _module(
    folder: Path,
    name: str,
    kind: Kind,
    keys: Mapping[str, str],
    places: Mapping[str, Place],
    stated: tuple[int, float],
    rslora: bool,
) -> Module:
    for letter in ("A", "B"):
        if letter not in keys:
            raise InputError(f"{folder / WEIGHTS}: module '{name}' lacks its factor {letter}")
    rank, alpha = stated
    A, B = places[keys["A"]].shape, places[keys["B"]].shape
    if len(A) != 2 or len(B) != 2:
        raise InputError(
            f"{folder}: module '{name}' has factors of shapes A {A} and B {B}",
            why="florana merges linear and embedding layers; a convolution's factors are no matrices",
        )
    if A[0] != rank or B[1] != rank:
        raise InputError(f"{folder}: module '{name}' has A {A} and B {B}, but {CONFIG} gives it rank {rank}")
    if 0 in A or 0 in B:
        raise InputError(f"{folder}: module '{name}' has A {A} and B {B}: a side of length 0")
    if len({places[key].dtype for key in keys.values()}) > 1:
        raise InputError(f"{folder}: module '{name}' has factors of different dtypes")
    if "bias" in keys and places[keys["bias"]].shape != (B[0],):
        raise InputError(f"{folder}: module '{name}' has a bias of shape {places[keys['bias']].shape} beside B {B}")
    scaling = alpha / (math.sqrt(rank) if rslora else rank)
    return Module(kind, rank, scaling, (B[0], A[1]), dict(keys))


def _read_headers(folder: Path) -> dict[str, Place]:
    """Key -> place, of one weight file or of all that an index names; the index must name each tensor's own file."""
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
    return read_header(path)
