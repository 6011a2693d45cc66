"""PEFT adapter folders <-> Adapter: whole adapters in and out of folders. Safetensors and JSON only.

A folder holds `adapter_model.safetensors` (keys `base_model.model.<module>.lora_A.weight` and so on) and
`adapter_config.json`. Ranks and scalings are per module (`rank_pattern`, `alpha_pattern`, rsLoRA).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from florana.adapters.headers import WEIGHTS
from florana.adapters.peft_config import CONFIG
from florana.adapters.peft_settings import SETTINGS
from florana.adapters.reader import PREFIX, AdapterCard, open_adapter
from florana.adapters.safetensors_io import write_tensors
from florana.atomic_files import replace_by, replace_file
from florana.errors import InputError
from florana.lora.factors import Adapter, LoraFactors

__all__ = ["CONFIG", "WEIGHTS", "AdapterCard", "read_adapter", "write_adapter"]


def read_adapter(folder: Path | str) -> tuple[Adapter, AdapterCard]:
    """The adapter in a PEFT folder, checked: shapes, scalings, every tensor accounted for, every value finite.

    A bias beside a factor B stands among the extra tensors, under its own name.

    Raises:
        InputError: the folder is not a LoRA adapter that florana can represent exactly; the message says why.
    """
    reader = open_adapter(Path(folder))
    modules = {name: reader.pair(name) for name in reader.modules}
    extra = {name: reader.tensor(key) for name, key in reader.extra.items()}
    biases = {f"{name}.lora_B.bias": bias for name in reader.modules if (bias := reader.bias(name)) is not None}
    return Adapter(modules, extra | biases), reader.card


def write_adapter(folder: Path | str, adapter: Adapter, card: AdapterCard, readme: str = "") -> None:
    """Write a folder that `PeftModel.from_pretrained` loads as it is; each file is replaced atomically.

    The bytes depend on the adapter and the card alone. Module ranks that differ go into `rank_pattern`, with an
    `alpha_pattern` that keeps each scaling.

    Args:
        folder: the adapter's folder; made where it is not there.
        adapter: the adapter; the factors in the types they have.
        card: what the configuration says.
        readme: the text of README.md; none is written where it is empty.

    Raises:
        InputError: a tensor has nothing in it, or the card carries a setting that PEFT has not or that is not carried.
    """
    folder = Path(folder)
    for setting in card.carried:
        if setting not in SETTINGS or SETTINGS[setting].rule != "carried":
            raise InputError(f"the card carries '{setting}', which is no setting to carry")
    for name, tensor in adapter.tensors().items():
        if not tensor.numel():
            raise InputError(f"the tensor '{name}' has shape {tuple(tensor.shape)}: nothing is in it")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.modules.items():
        letters = (
            ("lora_embedding_A", "lora_embedding_B") if name in card.embeddings else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{PREFIX}{name}.{letters[0]}"] = pair.A.contiguous()
        tensors[f"{PREFIX}{name}.{letters[1]}"] = pair.B.contiguous()
    for name, tensor in adapter.extra.items():
        tensors[f"{PREFIX}{name}"] = tensor.contiguous()
    replace_by(folder / WEIGHTS, lambda path: write_tensors(path, tensors))
    config = json.dumps(_config(adapter, card), indent=2, sort_keys=True) + "\n"
    if not (folder / CONFIG).exists() or (folder / CONFIG).read_text() != config:
        replace_file(folder / CONFIG, config.encode())
    if readme:
        replace_file(folder / "README.md", readme.encode())


def _config(adapter: Adapter, card: AdapterCard) -> dict[str, Any]:
    def alpha(pair: LoraFactors) -> float:
        value = pair.scaling * (math.sqrt(pair.rank) if card.rslora else pair.rank)
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value

    kinds = Counter((pair.rank, alpha(pair)) for pair in adapter.modules.values())
    (rank, common), _ = min(kinds.items(), key=lambda item: (-item[1], item[0]))
    targets = card.target_modules or tuple(adapter.modules)
    others = {name: pair for name, pair in adapter.modules.items() if (pair.rank, alpha(pair)) != (rank, common)}
    keys = _pattern_keys(others, adapter.modules)
    return dict(card.carried) | {
        "alpha_pattern": {keys[name]: alpha(pair) for name, pair in others.items()},
        "base_model_name_or_path": card.base_model,
        "bias": "none",
        "fan_in_fan_out": card.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": card.lora_bias,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(card.modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {keys[name]: pair.rank for name, pair in others.items()},
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "task_type": card.task_type,
        "use_dora": card.dora,
        "use_rslora": card.rslora,
    }


def _pattern_keys(names: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Name -> a key with which PEFT's pattern matches that module and no other of the modules.

    The name itself, but where it ends another one at a dot, or is one as a regular expression (a dot is any character).
    """
    ends = [".".join(parts[i:]) for parts in (name.split(".") for name in modules) for i in range(len(parts))]
    counts = Counter(ends)
    by_length: dict[int, list[str]] = {}
    for end in counts:
        by_length.setdefault(len(end), []).append(end)

    def is_plain(name: str) -> bool:
        if counts[name] > 1 or not re.fullmatch(r"[\w.-]+", name):
            return False
        return not any(
            end.count(".") < name.count(".") and re.fullmatch(name, end) for end in by_length.get(len(name), ())
        )

    return {name: name if is_plain(name) else f"^{re.escape(name)}" for name in names}
