"""PEFT adapter folders, read module by module: every tensor checked, nothing held longer than asked for.

Files are untrusted. The configuration decides rank and scaling of each module; the weights' header is compared with it
when the folder is opened, the values when they are read. Whatever changes a module's output in a way B @ A does not
say (DoRA and its kin) is refused by name. No pickle: `.bin` files are not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from florana.errors import InputError
from florana.factors import LoraFactors
from florana.tensor_files import Place, digest, read_header, read_tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INDEX = "adapter_model.safetensors.index.json"
PREFIX = "base_model.model."

Kind = Literal["linear", "embedding"]

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<letter>[AB])(?P<suffix>\.weight|\.bias)?$")
_NOT_A_PRODUCT = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
)
"""Settings of a PEFT LoRA configuration under which the update of a module is more than `scaling * B @ A`."""


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
    """

    base_model: str
    task_type: str | None
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    rslora: bool = False
    embeddings: tuple[str, ...] = ()
    lora_bias: bool = False


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
    config = _read_config(folder)
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
        match = _FACTOR.match(name)
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
        else:
            extra[name] = key
    if not found:
        raise InputError(f"{folder / WEIGHTS} holds no LoRA factors")
    modules = {
        name: _module(folder, name, kinds.get(name, "linear"), keys, places, config) for name, keys in found.items()
    }
    return AdapterReader(folder, _card(config, kinds), dict(sorted(modules.items())), extra, places)


def _card(config: Mapping[str, Any], kinds: Mapping[str, Kind]) -> AdapterCard:
    targets = config.get("target_modules") or ()
    return AdapterCard(
        base_model=str(config.get("base_model_name_or_path") or ""),
        task_type=config.get("task_type"),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        modules_to_save=tuple(sorted(config.get("modules_to_save") or ())),
        fan_in_fan_out=bool(config.get("fan_in_fan_out", False)),
        rslora=bool(config.get("use_rslora", False)),
        embeddings=tuple(sorted(name for name, kind in kinds.items() if kind == "embedding")),
        lora_bias=bool(config.get("lora_bias", False)),
    )


def _module(
    folder: Path,
    name: str,
    kind: Kind,
    keys: Mapping[str, str],
    places: Mapping[str, Place],
    config: Mapping[str, Any],
) -> Module:
    for letter in ("A", "B"):
        if letter not in keys:
            raise InputError(f"{folder / WEIGHTS}: module '{name}' lacks its factor {letter}")
    rank = int(_by_pattern(config.get("rank_pattern") or {}, name, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"]))
    A, B = places[keys["A"]].shape, places[keys["B"]].shape
    if len(A) != 2 or len(B) != 2:
        raise InputError(
            f"{folder}: module '{name}' has factors of shapes A {A} and B {B}",
            why="florana merges linear and embedding layers; a convolution's factors are no matrices",
        )
    if A[0] != rank or B[1] != rank:
        raise InputError(f"{folder}: module '{name}' has A {A} and B {B}, but {CONFIG} gives it rank {rank}")
    if "bias" in keys and places[keys["bias"]].shape != (B[0],):
        raise InputError(f"{folder}: module '{name}' has a bias of shape {places[keys['bias']].shape} beside B {B}")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Module(kind, rank, scaling, (B[0], A[1]), dict(keys))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise _no_adapter(folder) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from None
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        raise InputError(f"{path} does not describe a LoRA adapter", why="peft_type is not LORA")
    for setting in _NOT_A_PRODUCT:
        if config.get(setting):
            raise InputError(f"{path}: '{setting}' is on", why="its update is not a plain product B @ A")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is '{config['bias']}'", why="biases of the base are no part of a product B @ A")
    for setting in ("r", "lora_alpha"):
        if not _positive(config.get(setting)):
            raise InputError(f"{path}: '{setting}' is {config.get(setting)!r}, not a positive number")
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(setting) or {}
        if not isinstance(pattern, dict) or not all(map(_positive, pattern.values())):
            raise InputError(f"{path}: '{setting}' is not a table of positive numbers")
    for setting in ("target_modules", "modules_to_save"):
        value = config.get(setting) or ()
        if not isinstance(value, str) and not (
            isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        ):
            raise InputError(f"{path}: '{setting}' is not a list of names")
    return config


def _no_adapter(folder: Path) -> InputError:
    """Why there is no configuration in `folder`, in the words of someone who mistyped a name."""
    if not folder.is_dir():
        why = "it is a file; name the folder that holds the adapter" if folder.exists() else ""
        return InputError(f"{folder} is no adapter folder" if why else f"{folder} does not exist", why=why)
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    fix = f"it holds adapters ({', '.join(inside[:3])}{', ...' * (len(inside) > 3)}): name those"
    return InputError(
        f"{folder / CONFIG} does not exist", why="an adapter folder holds " + CONFIG, fix=fix * bool(inside)
    )


def _positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) and value > 0


def _read_headers(folder: Path) -> dict[str, Place]:
    """Key -> place, of one weight file or of all that an index names."""
    index = folder / INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} cannot be read", why=str(error)) from None
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise InputError(f"{index} names files outside its own folder")
        paths = [folder / name for name in sorted(names)]
    else:
        paths = [folder / WEIGHTS]
    places: dict[str, Place] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist", fix="save the adapter as safetensors; .bin files are not read")
        for key, place in read_header(path).items():
            if key in places:
                raise InputError(f"{path}: the tensor '{key}' stands in {places[key].path.name} too")
            places[key] = place
    return places


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regular expression, ends the module's name at a dot."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise InputError(f"the pattern {key!r} is not a regular expression", why=str(error)) from None
    return default
