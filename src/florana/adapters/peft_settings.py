"""Every setting of PEFT's `LoraConfig`, and what florana does with it: the one table, and the judgement by it.

A setting is read, carried through, without effect on a trained adapter, or refused by name where it is on. A setting
that is not in the table (of an older or a newer PEFT) is refused where it is on: what it means is not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from florana.errors import InputError

Rule = Literal["read", "carried", "idle", "refused"]

_OFF: tuple[Any, ...] = (None, False, [], {}, "")


@dataclass(frozen=True)
class Setting:
    """What is done with one setting.

    Args:
        rule: `read`: florana acts on it. `carried`: it goes into the result as it is, where all inputs agree. `idle`:
            it acts in training, or where another one is on, and not on a trained adapter. `refused`: by name where on.
        why: of the rule.
        off: the values with which a refused setting is off.
    """

    rule: Rule
    why: str
    off: tuple[Any, ...] = _OFF


_STARTS = "of an initialisation, which is over; `init_lora_weights` says whether it altered the base"
_UNFACTORED = "its update is no plain product B @ A"
_NOT_EMPTY = (None, False)
"""PEFT makes a configuration of its own of an empty table: `{}` switches such a variant on."""

SETTINGS: Mapping[str, Setting] = {
    "peft_type": Setting("read", "LORA alone"),
    "peft_version": Setting("idle", "of the program that wrote the file"),
    "task_type": Setting("read", "null beside a name is that name"),
    "auto_mapping": Setting("carried", "the base model's class, for AutoPeftModel; null beside a table is that table"),
    "base_model_name_or_path": Setting("read", "all inputs must agree, or --base settles it"),
    "revision": Setting("carried", "of the base model; null beside a name is that name"),
    "inference_mode": Setting("idle", "what is trained further"),
    "r": Setting("read", "with `rank_pattern`, held against every factor"),
    "rank_pattern": Setting("read", "matched as PEFT does; written for the result's own ranks"),
    "lora_alpha": Setting("read", "with `alpha_pattern`, the scaling"),
    "alpha_pattern": Setting("read", "matched as PEFT does; written for the result's own scalings"),
    "use_rslora": Setting("read", "alpha / sqrt(r)"),
    "fan_in_fan_out": Setting("read", "all inputs must agree"),
    "lora_bias": Setting("read", "s b beside s B A"),
    "modules_to_save": Setting("read", "whole tensors; the union goes into the result"),
    "target_modules": Setting("read", "carried with the three below, or the names of all modules"),
    "exclude_modules": Setting("carried", "part of which modules are adapted"),
    "layers_to_transform": Setting("carried", "part of which modules are adapted"),
    "layers_pattern": Setting("carried", "part of which modules are adapted"),
    "ensure_weight_tying": Setting("carried", "the output layer shares the embedding's factors"),
    "init_lora_weights": Setting("read", "refused where it alters the base (`HARMLESS_STARTS`); else it is over"),
    "loftq_config": Setting("idle", _STARTS),
    "eva_config": Setting("idle", _STARTS),
    "corda_config": Setting("idle", _STARTS),
    "lora_ga_config": Setting("idle", _STARTS),
    "lora_dropout": Setting("idle", "acts in training alone"),
    "runtime_config": Setting("idle", "PEFT ignores it in a file"),
    "megatron_core": Setting("idle", "the name of a library, for `megatron_config`"),
    "qalora_group_size": Setting("idle", "for `use_qalora`"),
    "bias": Setting("refused", "biases of the base are no part of a product B @ A", off=("none",)),
    "use_dora": Setting("refused", _UNFACTORED),
    "use_qalora": Setting("refused", _UNFACTORED),
    "use_bdlora": Setting("refused", _UNFACTORED, off=_NOT_EMPTY),
    "velora_config": Setting("refused", _UNFACTORED, off=_NOT_EMPTY),
    "arrow_config": Setting("refused", _UNFACTORED, off=_NOT_EMPTY),
    "monteclora_config": Setting("refused", _UNFACTORED, off=_NOT_EMPTY),
    "kasa_config": Setting("refused", "it alters the base when it is loaded", off=_NOT_EMPTY),
    "alora_invocation_tokens": Setting("refused", "it acts on some of the tokens alone"),
    "trainable_token_indices": Setting("refused", "rows of an embedding are no part of a product B @ A"),
    "target_parameters": Setting("refused", "a parameter's factors hold many matrices, not one product B @ A"),
    "layer_replication": Setting("refused", "its modules are not those of the base model"),
    "megatron_config": Setting("refused", "its layers are cut over several processes"),
}  # fmt: skip

SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Beside `target_modules`: which modules are adapted."""

HARMLESS_STARTS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})
"""Values of `init_lora_weights` that leave the base as it is."""

_ALTERING = re.compile(r"pissa|corda|olora|loftq|lora_ga", re.I)


def judge(config: Mapping[str, Any], path: Path) -> None:
    """Raise InputError naming the first setting of a configuration that is on and cannot be represented."""
    for name, value in config.items():
        setting = SETTINGS.get(name)
        if setting is None:
            if not _is_one_of(value, _OFF):
                raise InputError(
                    f"{path}: '{_short(name)}' is {_short(value)}",
                    why="no PEFT that florana knows has this setting, so what it changes is not known",
                    fix="if it changes nothing in a trained adapter, take it out of the file",
                )
        elif setting.rule == "refused" and not _is_one_of(value, setting.off):
            told = f"bias is {_short(value)}" if name == "bias" else f"'{name}' is on"
            raise InputError(f"{path}: {told}", why=setting.why)
    start = config.get("init_lora_weights")
    if start is None or str(start).lower() in HARMLESS_STARTS:
        return
    if _ALTERING.match(str(start)):
        raise InputError(
            f"{path}: 'init_lora_weights' is {_short(start)}",
            why="it takes a part of the base's weights into the factors, so the adapter's update is not B @ A alone",
            fix="save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "which turns it into a plain LoRA adapter",
        )
    raise InputError(f"{path}: 'init_lora_weights' is {_short(start)}, which no PEFT that florana knows has")


def carried(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings to carry through that are on. Raises InputError where one has not PEFT's type."""
    kept = {name: config[name] for name, setting in SETTINGS.items() if setting.rule == "carried" and config.get(name)}
    if config.get("layers_to_transform") == 0 and config["layers_to_transform"] is not False:
        kept["layers_to_transform"] = 0
    for name, value in kept.items():
        if not _TYPES[name](value):
            raise InputError(f"{path}: '{name}' is {_short(value)}, which PEFT does not take")
    if isinstance(config.get("target_modules"), str) and kept.keys() & {"layers_to_transform", "layers_pattern"}:
        raise InputError(f"{path}: 'layers_to_transform' beside a pattern in 'target_modules'", why="PEFT takes one")
    if "layers_pattern" in kept and "layers_to_transform" not in kept:
        raise InputError(f"{path}: 'layers_pattern' without 'layers_to_transform'", why="PEFT takes none alone")
    return kept


def _words(value: object) -> bool:
    return _word(value) or (isinstance(value, list) and all(map(_word, value)))


def _word(value: object) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


def _layers(value: object) -> bool:
    return _layer(value) or (isinstance(value, list) and all(map(_layer, value)))


def _layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_one_of(value: object, others: tuple[Any, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in others)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _table(value: object) -> bool:
    return isinstance(value, dict)


def _true(value: object) -> bool:
    return value is True


_TYPES = {
    "auto_mapping": _table,
    "revision": _word,
    "exclude_modules": _words,
    "layers_to_transform": _layers,
    "layers_pattern": _words,
    "ensure_weight_tying": _true,
}
