"""PEFT adapter folders, read module by module: every tensor checked, nothing held longer than asked for.

Files are untrusted. The configuration decides rank and scaling of each module; the weights' header is compared with it
when the folder is opened, the values when they are read. Whatever changes a module's output in a way B @ A does not
say (DoRA and its kin) is refused by name. No pickle: `.bin` files are not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from florana.adapters.headers import WEIGHTS, read_headers, stripped
from florana.adapters.patterns import unmatched
from florana.adapters.peft_config import CONFIG, names, ranks_and_alphas, read_config, renamed, targets
from florana.adapters.peft_settings import carried
from florana.adapters.safetensors_io import Place, digest, read_tensor
from florana.adapters.wrappers import unwrapped
from florana.errors import InputError
from florana.lora.factors import LoraFactors

PREFIX = "base_model.model."

Kind = Literal["linear", "embedding"]

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<letter>[AB])(?P<suffix>\.weight|\.bias)?$", re.S)


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter folder says beside its tensors; enough for PEFT to load it.

    Args:
        base_model: the folder or hub name of the base model.
        task_type: PEFT's name of the task (`SEQ_CLS`, `CAUSAL_LM`), or None.
        target_modules: the names PEFT matches modules by, or one pattern for their whole names. Empty: those of all
            modules in the folder.
        modules_to_save: the modules trained whole.
        fan_in_fan_out: True where the base weight is stored (in x out), as in Conv1D.
        rslora: the scaling is alpha / sqrt(r).
        embeddings: the adapted modules that are embeddings (their factors have other names in the file).
        lora_bias: the adapter holds a bias beside each B.
        dora: each module has a magnitude among the tensors trained whole, `<module>.lora_magnitude_vector`. Written,
            never read: such an update is no plain product.
        carried: other settings of PEFT's that go through as they are (`exclude_modules`, `layers_to_transform`,
            `layers_pattern`, `revision`, `auto_mapping`, `ensure_weight_tying`), where they are on.
    """

    base_model: str
    task_type: str | None
    target_modules: tuple[str, ...] | str
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    rslora: bool = False
    embeddings: tuple[str, ...] = ()
    lora_bias: bool = False
    dora: bool = False
    carried: Mapping[str, Any] = field(default_factory=dict)


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
        folder: the adapter's folder.
        card: what the configuration says.
        modules: module name -> its entry, sorted.
        extra: name -> key of the tensors trained whole, sorted.
        places: key -> where its values lie.
    """

    folder: Path
    card: AdapterCard
    modules: Mapping[str, Module]
    extra: Mapping[str, str]
    places: Mapping[str, Place]

    def pair(self, module: str) -> LoraFactors:
        """One module's factors, both in the wider of their two types.

        Raises InputError where a value is not finite or the file changed underneath.
        """
        entry, dtype = self.modules[module], self.dtype(module)
        A, B = self.tensor(entry.keys["A"]), self.tensor(entry.keys["B"])
        return LoraFactors(B=B.to(dtype), A=A.to(dtype), scaling=entry.scaling)

    def bias(self, module: str) -> Tensor | None:
        """The bias beside B (out,), to be multiplied by the scaling; None where there is none."""
        key = self.modules[module].keys.get("bias") if module in self.modules else None
        return None if key is None else self.tensor(key)

    def tensor(self, key: str) -> Tensor:
        """One tensor by its key in the file."""
        return read_tensor(self.places[key], key)

    def dtype(self, module: str) -> torch.dtype:
        """The type that holds both of a module's factors as they are stored, without reading them."""
        keys = self.modules[module].keys
        return torch.promote_types(self.places[keys["A"]].dtype, self.places[keys["B"]].dtype)

    def stored(self, module: str) -> set[str]:
        """The types in which a module's factors are stored, by name."""
        keys = self.modules[module].keys
        return {str(self.places[keys[letter]].dtype).removeprefix("torch.") for letter in ("A", "B")}

    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({place.path for place in self.places.values()})

    def sha256(self) -> dict[str, str]:
        """File name -> digest, of the configuration and all weight files."""
        return {path.name: digest(path) for path in (self.folder / CONFIG, *self.files())}


def open_adapter(folder: Path, strip: Callable[[str], str] = unwrapped) -> AdapterReader:
    """Open a PEFT LoRA folder: configuration and header checked against each other.

    Args:
        folder: where.
        strip: takes the names of wrappers out of a name.

    Raises:
        InputError: the folder is not a LoRA adapter that can be represented exactly; the message says why.
    """
    config = read_config(folder)
    raw = read_headers(folder)
    places = stripped(raw, strip)
    if places.keys() != raw.keys():
        config = renamed(config, strip)
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
            if kinds.setdefault(match["module"], kind) != kind:
                raise InputError(
                    f"{places[key].path}: module '{match['module']}' is both a linear layer and an embedding"
                )
            found.setdefault(match["module"], {})[match["letter"]] = key
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
    card = _card(config, kinds, folder / CONFIG)
    require_applied(modules, card, str(folder))
    return AdapterReader(folder, card, dict(sorted(modules.items())), extra, places)


def require_applied(modules: Iterable[str], card: AdapterCard, whose: str) -> None:
    """Raise InputError naming a module whose factors PEFT would leave out, by what the card says."""
    for name in modules:
        for saved in card.modules_to_save:
            if f".{saved}." in f".{name}.":
                raise InputError(
                    f"{whose}: module '{name}' has LoRA factors and is part of '{saved}', which is saved whole",
                    why="PEFT leaves the factors out of such a module",
                )
    if card.carried.get("ensure_weight_tying"):
        return  # the output layer is adapted without being named
    for name in _unnamed(list(modules), card.target_modules, whose):
        raise InputError(
            f"{whose}: module '{name}' has LoRA factors, but target_modules does not name it",
            why="PEFT leaves the factors out of such a module",
        )


def _unnamed(modules: Sequence[str], targets: tuple[str, ...] | str, whose: str) -> list[str]:
    """The modules that `target_modules` certainly does not name."""
    if not targets or targets == "all-linear":
        return []
    if isinstance(targets, str):
        try:
            return unmatched(targets, modules, Path(whose), "target_modules")
        except InputError:  # one that only Python's `re` reads (lookaheads): it is carried, and not tried
            return []
    return [name for name in modules if not any(f".{name}".endswith(f".{target}") for target in targets)]


def _card(config: Mapping[str, Any], kinds: Mapping[str, Kind], path: Path) -> AdapterCard:
    return AdapterCard(
        base_model=config.get("base_model_name_or_path") or "",
        task_type=config.get("task_type") or None,
        target_modules=targets(config.get("target_modules")),
        modules_to_save=names(config.get("modules_to_save")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        rslora=bool(config.get("use_rslora")),
        embeddings=tuple(sorted(name for name, kind in kinds.items() if kind == "embedding")),
        lora_bias=bool(config.get("lora_bias")),
        carried=carried(config, path),
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
    if "bias" in keys and places[keys["bias"]].shape != (B[0],):
        raise InputError(f"{folder}: module '{name}' has a bias of shape {places[keys['bias']].shape} beside B {B}")
    scaling = alpha / (math.sqrt(rank) if rslora else rank)
    return Module(kind, rank, scaling, (B[0], A[1]), dict(keys))
