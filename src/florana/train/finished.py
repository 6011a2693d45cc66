"""A finished adapter on its base model, loaded by PEFT alone: of a run, of a merge, or any plain PEFT folder."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor

from florana.adapters.headers import read_headers
from florana.adapters.hub import adapter_folder
from florana.adapters.peft_config import CONFIG, read_json
from florana.adapters.reader import open_adapter
from florana.bounded import read_toml
from florana.errors import InputError
from florana.recipe.usage import Usage, read_usage
from florana.train.data.tokenize import Example, collate
from florana.train.loading import AUTO, load_tokenizer, locate, not_loaded, pick_device
from florana.train.probe import padding_side

TASKS = {"SEQ_CLS": "sequence-classification", "CAUSAL_LM": "causal-lm"}


@dataclass(eq=False)
class Finished:
    """A model that answers; what scores and generation ask of a bench, it has.

    Args:
        model: base and adapter, in evaluation mode.
        tokenizer: the base model's, able to pad.
        device: of the model.
        usage: how it was trained to be asked.
        padding: the side on which rows are padded; None where rows of unlike length must not stand together.
        drawn: the layers that the base lacks, which were drawn for the training.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    usage: Usage
    padding: str | None = None
    drawn: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._inputs = {"labels", *inspect.signature(self.model.get_base_model().forward).parameters}

    def batch(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Rows as tensors on the device, padded as the model reads them."""
        return collate(rows, self.tokenizer.pad_token_id, self.device, self.padding or self.tokenizer.padding_side)

    def accepted(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a batch, the inputs that the model knows."""
        return {name: tensor for name, tensor in batch.items() if name in self._inputs}

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """The model's output for a batch."""
        return self.model(**self.accepted(batch))

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Within it the model is the base as it was before training.

        Raises:
            InputError: the base alone is no model for the task, or the adapter holds its biases, which stay.
        """
        bias = [str(config.bias) for config in self.model.peft_config.values() if config.bias != "none"]
        if self.drawn or bias:
            raise InputError(
                "the starting model cannot be had from this adapter",
                why=f"its bias is '{bias[0]}', and the base's own biases are not kept beside it"
                if bias
                else f"the base has no {', '.join(self.drawn[:4])} of its own",
                fix="leave --starting out; a run's report and setup.json say how its starting model scored",
            )
        with self.model.disable_adapter():
            yield


def adapter_in(folder: Path) -> Path:
    """The adapter folder itself: of a run folder the one inside."""
    if (folder / CONFIG).exists() or not (folder / "adapter" / CONFIG).exists():
        return folder
    return folder / "adapter"


def open_finished(
    folder: Path, base: str | None = None, device: str = "auto", labels: Sequence[str] | None = None
) -> Finished:
    """Load a finished adapter.

    Args:
        folder: a run folder, or a PEFT adapter's.
        base: the base model, where the adapter's configuration names one that is not here.
        device: auto, cpu, cuda or mps.
        labels: the classes' names, where the folder does not say them.

    Raises:
        InputError: no adapter, a damaged one, one whose head is not in it, a base model that cannot be loaded.
    """
    place = adapter_in(adapter_folder(folder))
    config = _checked(place)
    usage = read_usage(place) or Usage(task=_task(config, place))
    if labels is not None:
        usage = usage.model_copy(update={"labels": list(labels)})
    named = base or _base_of_run(place) or config.get("base_model_name_or_path")
    if not named:
        raise InputError(f"{place / CONFIG} names no base model", fix="give it by --base")
    where = locate(named)
    tokenizer = load_tokenizer(where, named)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    chosen = pick_device(device)
    model, drawn = _model(where, named, place, usage)
    model = model.to(chosen).eval()
    for own in (model.config, model.config.get_text_config()):
        own.pad_token_id = tokenizer.pad_token_id
    if usage.task == "sequence-classification" and not usage.labels:
        names = model.config.id2label
        usage = usage.model_copy(update={"labels": [str(names[index]) for index in range(len(names))]})
    finished = Finished(model, tokenizer, chosen, usage, drawn=drawn)
    finished.padding = padding_side(finished, usage.task)
    return finished


def _base_of_run(place: Path) -> str | None:
    """Of a run's adapter, its base where the run took it from, if that is here: the adapter may name the hub's."""
    try:
        recipe = read_toml(place.parent / "recipe.toml") if place.name == "adapter" else {}
        base = str(recipe.get("model", {}).get("base") or "")
    except (OSError, ValueError, AttributeError):
        return None
    try:
        return base if locate(base) and (base.startswith("package:") or Path(base).is_absolute()) else None
    except InputError:  # the run was made on another machine
        return None


def _checked(place: Path) -> dict[str, Any]:
    """The configuration, after the folder was read as untrusted. PEFT alone can say what DoRA's magnitudes do."""
    if not (place / CONFIG).exists():
        open_adapter(place)  # says what is there instead
    config = read_json(place / CONFIG)
    if isinstance(config, dict) and config.get("use_dora") is True and str(config.get("peft_type")).upper() == "LORA":
        read_headers(place)
        return config
    open_adapter(place)
    assert isinstance(config, dict)
    return config


def _task(config: Mapping[str, Any], place: Path) -> Any:
    given = str(config.get("task_type") or "")
    if given not in TASKS:
        raise InputError(
            f"{place / CONFIG}: task_type is {given or 'not given'}",
            why="it says whether the model names classes or writes text",
            fix=f"set it to one of {', '.join(TASKS)}",
        )
    return TASKS[given]


def _model(where: str, named: str, place: Path, usage: Usage) -> tuple[Any, tuple[str, ...]]:
    """Base and adapter, and what the adapter brings that the base lacks."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, usage.dtype)}
    stored = {key.removeprefix("base_model.model."): at.shape for key, at in read_headers(place).items()}
    if usage.task == "sequence-regression":
        options |= {"num_labels": 1, "problem_type": "regression"}
    elif usage.task == "sequence-classification" and (classes := _classes(stored) or len(usage.labels)):
        options["num_labels"] = classes
        if usage.labels and len(usage.labels) != classes:
            raise InputError(
                f"{len(usage.labels)} classes are named, and the model tells {classes} apart",
                fix="name them all by --labels, in the order of the model's outputs",
            )
    try:
        base, told = AUTO[usage.task][0].from_pretrained(
            where, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    except Exception as error:
        raise not_loaded("model", named, error) from None
    random = sorted(set(told["missing_keys"]) | {key for key, *_ in told["mismatched_keys"]})
    random = [name for name in random if name in dict(base.named_parameters())]
    drawn = tuple(name for name in random if name in stored)
    if random := [name for name in random if name not in stored]:
        raise InputError(
            f"{place} does not hold {', '.join(random[:4])}, which the base model '{named}' lacks too",
            why="such layers would be drawn at random: the adapter was saved without its head, or the head stayed with "
            "the clients",
            fix="give the base model that it was trained on (--base), or an adapter with its head",
        )
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(base, str(place))
        except Exception as error:  # PEFT raises what it likes
            raise InputError(
                f"{place} does not fit the model '{named}'",
                why=f"{type(error).__name__}: {error}".splitlines()[0],
                fix="give the base model that it was trained on (--base)",
            ) from None
    lost = [str(note.message) for note in noted if "missing adapter keys" in str(note.message)]
    if lost:
        raise InputError(f"{place} does not hold all that its configuration promises", why=lost[0][:300])
    return model, drawn


def _classes(stored: Mapping[str, Sequence[int]]) -> int | None:
    """How many classes a head in the folder has: the rows of the smallest matrix trained whole, the output layer."""
    whole = [at for key, at in stored.items() if key.endswith(".weight") and "lora_" not in key]
    heads = [shape[0] for shape in whole if len(shape) == 2]
    return min(heads) if heads else None
