"""PEFT adapter folders <-> Adapter: the only reader and writer of factor files. Safetensors and JSON only.

A folder holds `adapter_model.safetensors` (keys `base_model.model.<module>.lora_A.weight` and so on) and
`adapter_config.json`. Ranks and scalings are per module (`rank_pattern`, `alpha_pattern`, rsLoRA). Whatever changes
the module's output in a way that B @ A does not say (DoRA and its kin) is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from florana.errors import InputError
from florana.factors import Adapter, LoraFactors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<letter>[AB])\.weight$")
_NOT_A_PRODUCT = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "target_parameters",
    "trainable_token_indices",
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
    """

    base_model: str
    task_type: str | None
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    rslora: bool = False


def read_adapter(folder: Path) -> tuple[Adapter, AdapterCard]:
    """The adapter in a PEFT folder, checked: shapes, scalings, every tensor accounted for, every value finite.

    Raises:
        InputError: the folder is not a LoRA adapter that florana can represent exactly; the message says why.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    pairs: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        if not key.startswith(_PREFIX):
            raise InputError(
                f"{folder / WEIGHTS}: the tensor '{key}' does not start with '{_PREFIX}'",
                why="this is not the layout PEFT writes",
            )
        if not tensor.isfinite().all():
            raise InputError(f"{folder / WEIGHTS}: the tensor '{key}' has values that are not finite")
        name = key.removeprefix(_PREFIX)
        match = _FACTOR.match(name)
        if match:
            pairs.setdefault(match["module"], {})[match["letter"]] = tensor
        elif ".lora_" in name:
            raise InputError(
                f"{folder / WEIGHTS}: no rule for the tensor '{key}'",
                why="only plain LoRA factors (lora_A, lora_B weights) are products B @ A",
            )
        else:
            extra[name] = tensor
    if not pairs:
        raise InputError(f"{folder / WEIGHTS} holds no LoRA factors")
    modules: dict[str, LoraFactors] = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            missing = "B" if "A" in pair else "A"
            raise InputError(f"{folder / WEIGHTS}: module '{module}' lacks its factor {missing}")
        rank = int(_by_pattern(config.get("rank_pattern") or {}, module, config["r"]))
        alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
        if pair["A"].ndim != 2 or pair["A"].shape[0] != rank:
            raise InputError(
                f"{folder}: module '{module}' has A of shape {tuple(pair['A'].shape)}, "
                f"but {CONFIG} gives it rank {rank}"
            )
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules[module] = LoraFactors(B=pair["B"], A=pair["A"], scaling=scaling)
    targets = config.get("target_modules") or ()
    card = AdapterCard(
        base_model=str(config.get("base_model_name_or_path") or ""),
        task_type=config.get("task_type"),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        modules_to_save=tuple(sorted(config.get("modules_to_save") or ())),
        fan_in_fan_out=bool(config.get("fan_in_fan_out", False)),
        rslora=bool(config.get("use_rslora", False)),
    )
    return Adapter(modules, extra), card


def write_adapter(folder: Path, adapter: Adapter, card: AdapterCard, readme: str = "") -> None:
    """Write a folder that `PeftModel.from_pretrained` loads as it is; each file is replaced atomically.

    The bytes depend on the adapter and the card alone. Module ranks that differ go into `rank_pattern`, with an
    `alpha_pattern` that keeps each scaling.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.B.contiguous()
    for name, tensor in adapter.extra.items():
        tensors[f"{_PREFIX}{name}"] = tensor.contiguous()
    replace_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    config = json.dumps(_config(adapter, card), indent=2, sort_keys=True) + "\n"
    if not (folder / CONFIG).exists() or (folder / CONFIG).read_text() != config:
        replace_file(folder / CONFIG, config.encode())
    if readme:
        replace_file(folder / "README.md", readme.encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, flush it to the disk, and move it over `path` in one step."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries (renames) to the disk, where the system can."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _config(adapter: Adapter, card: AdapterCard) -> dict[str, Any]:
    def alpha(pair: LoraFactors) -> float:
        value = pair.scaling * (math.sqrt(pair.rank) if card.rslora else pair.rank)
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value

    kinds = Counter((pair.rank, alpha(pair)) for pair in adapter.modules.values())
    (rank, common), _ = min(kinds.items(), key=lambda item: (-item[1], item[0]))
    others = {name: pair for name, pair in adapter.modules.items() if (pair.rank, alpha(pair)) != (rank, common)}
    return {
        "alpha_pattern": {name: alpha(pair) for name, pair in others.items()},
        "base_model_name_or_path": card.base_model,
        "bias": "none",
        "fan_in_fan_out": card.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(card.modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: pair.rank for name, pair in others.items()},
        "target_modules": sorted(card.target_modules),
        "task_type": card.task_type,
        "use_dora": False,
        "use_rslora": card.rslora,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", why="an adapter folder holds " + CONFIG) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from None
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        raise InputError(f"{path} does not describe a LoRA adapter", why="peft_type is not LORA")
    for setting in _NOT_A_PRODUCT:
        if config.get(setting):
            raise InputError(f"{path}: '{setting}' is on", why="its update is not a plain product B @ A")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is '{config['bias']}'", why="biases are not part of a product B @ A")
    for setting in ("r", "lora_alpha"):
        value = config.get(setting)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InputError(f"{path}: '{setting}' is {value!r}, not a positive number")
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(setting) or {}
        if not isinstance(pattern, dict) or any(
            isinstance(v, bool) or not isinstance(v, int | float) or not v > 0 for v in pattern.values()
        ):
            raise InputError(f"{path}: '{setting}' is not a table of positive numbers")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist", fix="save the adapter as safetensors; .bin files are not read"
        ) from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from None


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regular expression, ends the module's name at a dot."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise InputError(f"the pattern {key!r} is not a regular expression", why=str(error)) from None
    return default
