"""What a model adapts and holds, from its configuration alone: built on the meta device, without a single weight."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS

from florana.errors import InputError, nearest

PRESETS: dict[str, Callable[[], Any]] = {
    "roberta-large": lambda: transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=514,
        type_vocab_size=1,
    ),
    "llama-2-7b": lambda: transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "llama-3-8b": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "mistral-7b": lambda: transformers.MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "gemma-2-9b": lambda: transformers.Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
}
"""The shapes of well-known models, by the configuration classes of Transformers and the models' published sizes."""


@dataclass(frozen=True)
class Shapes:
    """A model's adapted modules and its size.

    Args:
        model: as it was asked for. modules: name -> (out, in). parameters: of the whole base model.
    """

    model: str
    modules: dict[str, tuple[int, int]]
    parameters: int


def shapes_of(model: str, targets: Sequence[str] = ()) -> Shapes:
    """The shapes of a preset, of a folder with a config.json, or of a hub name.

    Args:
        targets: last parts of module names, or `all-linear`; PEFT's usual ones for the model's kind where not given.

    Raises:
        InputError: no such model or configuration, or no module of that name.
    """
    config = _config(model)
    wanted = tuple(targets) or tuple(USUAL_TARGETS.get(config.model_type, ()))
    if not wanted:
        raise InputError(f"florana knows no usual target modules for '{config.model_type}'", fix="give --targets")
    with torch.device("meta"), _quiet():
        base = transformers.AutoModel.from_config(config)
    linear = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
    }
    chosen = {
        name: module for name, module in linear.items() if wanted == ("all-linear",) or name.split(".")[-1] in wanted
    }
    for target in wanted:
        if target != "all-linear" and not any(name.split(".")[-1] == target for name in chosen):
            known = {name.split(".")[-1] for name in linear}
            raise InputError(f"the model '{model}' has no module '{target}'", fix=nearest(target, known))
    return Shapes(
        model,
        {name: _shape(module) for name, module in sorted(chosen.items())},
        sum(parameter.numel() for parameter in base.parameters()),
    )


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, torch.nn.Linear) else (columns, rows)


def _config(model: str) -> Any:
    if model in PRESETS:
        return PRESETS[model]()
    try:
        with _quiet():
            return transformers.AutoConfig.from_pretrained(model)
    except Exception as error:  # the loaders raise many kinds: missing files, no connection, bad JSON
        place = (
            "the folder holds no usable config.json" if Path(model).exists() else "no such preset, folder or hub name"
        )
        raise InputError(
            f"the configuration of '{model}' could not be read: {place}",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix=f"presets: {', '.join(PRESETS)}; or give a folder with a config.json",
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The hub's client retries aloud; the error that follows says it once."""
    transformers.utils.logging.set_verbosity_error()
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        hub.setLevel(before)
