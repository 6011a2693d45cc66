"""PEFT's adapter_config.json, judged before anything is made of it. Untrusted: every setting that florana uses has one
type, and what it does not say is not guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from florana import bounded
from florana.adapters.patterns import by_pattern
from florana.adapters.peft_settings import judge
from florana.adapters.safetensors_io import no_twins
from florana.errors import InputError

CONFIG = "adapter_config.json"

_LARGEST = 1e15
"""No rank or alpha is above it; their ratios and products stay far inside the range of a float."""


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration, as a table of settings of the right types. Raises InputError, naming file and setting."""
    path = folder / CONFIG
    if not path.exists():
        raise _no_adapter(folder)
    config = read_json(path)
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        raise InputError(f"{path} does not describe a LoRA adapter", why="peft_type is not LORA")
    judge(config, path)
    for setting, whole in (("r", True), ("lora_alpha", False)):
        if not _positive(config.get(setting), whole):
            raise InputError(f"{path}: '{setting}' is {_short(config.get(setting))}, not a positive number")
    for setting, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        pattern = {} if config.get(setting) is None else config[setting]
        if not isinstance(pattern, dict) or not all(_positive(value, whole) for value in pattern.values()):
            raise InputError(f"{path}: '{setting}' is not a table of positive numbers")
    for setting in ("use_rslora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.get(setting), bool | None):
            raise InputError(f"{path}: '{setting}' is {_short(config[setting])}, neither true nor false")
    for setting in ("base_model_name_or_path", "task_type"):
        if config.get(setting) not in (None, "") and not _name(config[setting]):
            raise InputError(f"{path}: '{setting}' is {_short(config[setting])}, not a name")
    for setting in ("target_modules", "modules_to_save"):
        value = config.get(setting)
        if value is not None and not _name(value) and not (isinstance(value, list) and all(map(_name, value))):
            raise InputError(f"{path}: '{setting}' is not a list of names")
    return config


def read_json(path: Path) -> Any:
    """A JSON file in which no key stands twice. Raises InputError where it is none."""
    try:
        return bounded.read_json(path, no_twins)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from None


def ranks_and_alphas(config: Mapping[str, Any], modules: Sequence[str], path: Path) -> dict[str, tuple[int, float]]:
    """What the configuration says of each module. Raises InputError as `module_patterns.by_pattern`."""
    ranks = by_pattern(config.get("rank_pattern") or {}, modules, config["r"], path, "rank_pattern")
    alphas = by_pattern(config.get("alpha_pattern") or {}, modules, config["lora_alpha"], path, "alpha_pattern")
    return {name: (int(ranks[name]), float(alphas[name])) for name in ranks}


def names(value: str | list[str] | None) -> tuple[str, ...]:
    """A setting that is one name, a list of them, or absent; sorted."""
    return (value,) if isinstance(value, str) else tuple(sorted(value or ()))


def targets(value: str | list[str] | None) -> tuple[str, ...] | str:
    """`target_modules`: one string is a pattern and stays one; a list of names is sorted."""
    return value if isinstance(value, str) else names(value)


def renamed(config: Mapping[str, Any], strip: Callable[[str], str]) -> dict[str, Any]:
    """The configuration with `strip` applied to every name or pattern of modules; of two that become one the first
    decides, as in PEFT."""
    result = dict(config)
    for setting in ("target_modules", "modules_to_save", "exclude_modules", "layers_pattern"):
        value = config.get(setting)
        if isinstance(value, str):
            result[setting] = strip(value)
        elif isinstance(value, list):
            result[setting] = list(dict.fromkeys(strip(name) if isinstance(name, str) else name for name in value))
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, float] = {}
        for key, number in (config.get(setting) or {}).items():
            patterns.setdefault(strip(key), number)
        result[setting] = patterns
    return result


def _no_adapter(folder: Path) -> InputError:
    """Why there is no configuration in `folder`, for someone who mistyped a name."""
    if folder.is_file():
        return InputError(f"{folder} is no adapter folder", why="it is a file; name the folder that holds the adapter")
    if not folder.is_dir():
        return InputError(f"{folder} does not exist")
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    fix = f"it holds adapters ({', '.join(inside[:3])}{', ...' * (len(inside) > 3)}): name those"
    return InputError(
        f"{folder / CONFIG} does not exist", why="an adapter folder holds " + CONFIG, fix=fix * bool(inside)
    )


def _positive(value: object, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 1 / _LARGEST <= value <= _LARGEST and (not whole or value == math.floor(value))


def _name(value: object) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
