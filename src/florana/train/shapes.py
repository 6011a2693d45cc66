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

from florana.errors import InputError
from florana.recipe import schema as r
from florana.train.gguf_files import is_gguf
from florana.train.loading import AUTO, locate, modules_trained_whole, not_loaded, with_lora
from florana.train.targets import ALL_LINEAR, adapted_modules, whole_modules

TASKS = ("sequence-classification", "causal-lm")

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
        model: as it was asked for.
        modules: name -> (out, in).
        parameters: of the whole base model.
    """

    model: str
    modules: dict[str, tuple[int, int]]
    parameters: int


def shapes_of(model: str, targets: str | Sequence[str] = (), task: str | None = None) -> Shapes:
    """The shapes of a preset, of a folder with a config.json, or of a hub name: the modules that a run would adapt.

    Args:
        model: a preset, a folder or a hub name.
        targets: as a recipe's `model.target_modules`; PEFT's usual ones for the model's kind where not given.
        task: as a recipe's; without it, that of the first class that the family has, a classifier before a decoder.

    Raises:
        InputError: no such model, configuration or task, or what a run refuses: no module of that name, experts, a
            checkpoint that lacks a part of its model.
    """
    config = _config(model)
    wanted = targets or USUAL_TARGETS.get(config.model_type, ())
    if not wanted:
        raise InputError(f"florana knows no usual target modules for '{config.model_type}'", fix="give --targets")
    known = [name for name in TASKS if type(config) in AUTO[name][0]._model_mapping]
    if task is not None and task not in known:
        raise InputError(f"the model '{model}' cannot be had for the task '{task}'", fix=f"tasks: {', '.join(known)}")
    chosen = task or next(iter(known), None)
    if chosen is None:
        raise InputError(f"the model '{model}' is neither a classifier nor a decoder of Transformers")
    with torch.device("meta"), _quiet():
        base, whole = _head_on(model, config, chosen)
        given = [wanted] if isinstance(wanted, str) else list(wanted)
        names = given[0] if isinstance(wanted, str) or given == [ALL_LINEAR] else given
        modules = adapted_modules(base, names, whole, model)
        with_lora(base, r.Model(base=model, target_modules=names, rank=1), chosen, whole)  # what a run would refuse
        whole_base = transformers.AutoModel.from_config(config, trust_remote_code=False)
        parameters = sum(parameter.numel() for parameter in whole_base.parameters())
    prefix = f"{base.base_model_prefix}."
    return Shapes(
        model, {name.removeprefix(prefix): _shape(module) for name, module in sorted(modules.items())}, parameters
    )


def _head_on(model: str, config: Any, task: str) -> tuple[Any, tuple[str, ...]]:
    """The model of the task without a weight, and what a run would train whole: of a folder, by its checkpoint."""
    loader = AUTO[task][0]
    if Path(model).is_dir() and any(Path(model).glob("*.safetensors")):
        base, told = loader.from_pretrained(
            model,
            config=config,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
        return base, modules_trained_whole(base, told | {"mismatched_keys": set()}, task, model)
    base = loader.from_config(config, trust_remote_code=False)
    return base, () if task == "causal-lm" else whole_modules(base, (), model)


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
            place = locate(model) if is_gguf(model) else model
            return transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # the loaders raise many kinds: missing files, no connection, bad JSON
        if "trust_remote_code" in str(error):
            raise not_loaded("model", model, error) from None
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
