"""One base model with one LoRA adapter in it: adapters are copied in and out, the base is never touched.

However many clients there are, there is one Workbench, and so one copy of the base model in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from florana.adapters.adapter_folder import AdapterCard
from florana.errors import InputError
from florana.federation.sampling import derive
from florana.lora.factors import Adapter, LoraFactors
from florana.recipe import schema as r
from florana.train.data.tokenize import Example, collate
from florana.train.hooks import Core, Residual, copied
from florana.train.loading import (
    load_base,
    load_tokenizer,
    locate,
    pick_device,
    renamings_ignored,
    with_lora,
)
from florana.train.probe import probe
from florana.train.targets import PREFIX


class Workbench:
    """A PEFT model whose adapter can be set and read; holds the tokenizer and what the adapter's folder says.

    Args:
        settings: the recipe's model section.
        task: `sequence-classification`, `sequence-regression` or `causal-lm`.
        labels: class names, empty for the last two.
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
        self.tokenizer = load_tokenizer(place, settings.base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "model"))
            base, whole = load_base(place, settings, task, len(labels), self.device)
            self.model = with_lora(base, settings, task, whole)
        self.model.to(self.device) if settings.quantization == "none" else None
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = self.tokenizer.pad_token_id
        if settings.gradient_checkpointing:
            with renamings_ignored():
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        _widen_heads(self.model)
        self.layers = _lora_layers(self.model)
        self._extra = _whole_parameters(self.model) | _magnitudes(self.layers)
        self._inputs = {"labels", *inspect.signature(base.forward).parameters}
        self.padding: str | None = None
        """The side on which rows may be padded; None where that changes what the model makes of them."""
        self._residual: Adapter | None = None
        self._residual_hooks: list[Any] = []
        self._cores: dict[str, Core] = {}
        self.padding = probe(self, task, settings.base)
        config = self.model.peft_config["default"]
        self.card = AdapterCard(
            base_model=settings.hub_name or settings.base,
            task_type=str(config.task_type.value),
            # a regular expression is written out as the names it matched
            target_modules=tuple(
                sorted(self.layers if isinstance(config.target_modules, str) else config.target_modules)
            ),
            modules_to_save=tuple(sorted(config.modules_to_save or ())),
            fan_in_fan_out=bool(config.fan_in_fan_out),
            rslora=settings.rslora,
            dora=settings.variant == "dora",
        )

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters a client trains: factors or cores, and the head where there is one."""
        return [
            parameter
            for parameter in (*self.model.parameters(), *(p for core in self._cores.values() for p in core.parameters))
            if parameter.requires_grad
        ]

    @property
    def base_parameters(self) -> int:
        """How many parameters the frozen base model holds."""
        return sum(parameter.numel() for _, parameter in self.frozen())

    def frozen(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The base model's own parameters, by name, in the order of their names."""
        own = {id(p) for layer in self.layers.values() for p in _factors(layer)}
        own |= {id(p) for p in self._extra.values()}
        return sorted((name, p) for name, p in self.model.named_parameters() if id(p) not in own)

    def adapter(self) -> Adapter:
        """A copy of the adapter as it is now: float32, on the CPU, with head and magnitudes among the extra tensors."""
        modules = {n: LoraFactors(copied(p.B), copied(p.A), p.scaling) for n, p in self.factors.items()}
        extra = {name: copied(parameter) for name, parameter in self._extra.items()}
        return Adapter(modules, extra, {name: core.value() for name, core in self._cores.items()})

    @property
    def factors(self) -> dict[str, LoraFactors]:
        """Module name -> the very parameters that are trained, no copies."""
        return {
            name: LoraFactors(
                B=layer.lora_B["default"].weight,
                A=layer.lora_A["default"].weight,
                scaling=float(layer.scaling["default"]),
            )
            for name, layer in self.layers.items()
        }

    def load(
        self,
        adapter: Adapter,
        residual: Adapter | None = None,
        trains: Collection[str] = ("A", "B", "core"),
        blocks: Collection[int] | None = None,
    ) -> None:
        """Set the adapter (copied in; any rank) and the frozen residual. Extra tensors not named stay as they are.

        `trains` are the kinds of tensors (`A`, `B`, `core`, `scale`) that will get gradients; of cores and their scales
        the `blocks` alone, where given.
        """
        for core in self._cores.values():
            core.remove()
        self._cores = {}
        with torch.no_grad():
            for name, layer in self.layers.items():
                pair = adapter.modules[name]
                for letter, linear, value in (
                    ("A", layer.lora_A["default"], pair.A),
                    ("B", layer.lora_B["default"], pair.B),
                ):
                    if linear.weight.shape != value.shape:
                        linear.weight = torch.nn.Parameter(torch.empty_like(value, device=self.device))
                    linear.weight.copy_(value)
                    linear.weight.requires_grad_(letter in trains)
                layer.scaling["default"] = pair.scaling
                if name in adapter.cores:
                    self._cores[name] = Core(layer.lora_A["default"], adapter.cores[name], trains, blocks)
            self.load_extra(adapter.extra)
        if residual is not self._residual:
            for hook in self._residual_hooks:
                hook.remove()
            pairs = residual.modules if residual is not None else {}
            self._residual_hooks = [
                self.layers[name].register_forward_hook(Residual(pair, self.device)) for name, pair in pairs.items()
            ]
            self._residual = residual

    def load_extra(self, extra: Mapping[str, Tensor]) -> None:
        """Set some of the tensors that are trained whole."""
        with torch.no_grad():
            for name, tensor in extra.items():
                self._extra[name].copy_(tensor)

    def weights(self) -> dict[str, tuple[torch.nn.Parameter, bool]]:
        """Module name -> the frozen base weight under its adapter, and whether it is stored as (in, out)."""
        return {
            name: (layer.get_base_layer().weight, bool(layer.fan_in_fan_out)) for name, layer in self.layers.items()
        }

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Rows as tensors on the device, padded as the model reads them."""
        return collate(examples, self.tokenizer.pad_token_id, self.device, self.padding or self.tokenizer.padding_side)

    def accepted(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a batch, the inputs that the model knows."""
        return {name: tensor for name, tensor in batch.items() if name in self._inputs}

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """The model's output for a batch, without the inputs it does not know."""
        # a cache of keys would keep Transformers from looking for rows laid end to end
        cache = {"use_cache": False} if "position_ids" in batch and "use_cache" in self._inputs else {}
        return self.model(**self.accepted(batch), **cache)


def _lora_layers(model: Any) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if "default" not in module.lora_A:
                raise InputError(f"module '{name}' is no linear layer; florana adapts linear layers and Conv1D")
            layers[name.removeprefix(PREFIX)] = module
    return layers


def _magnitudes(layers: Mapping[str, Any]) -> dict[str, torch.nn.Parameter]:
    """DoRA's length of each row, (out,), by the names that PEFT's files have; trained in float32."""
    found: dict[str, torch.nn.Parameter] = {}
    for name, layer in layers.items():
        if "default" in layer.lora_magnitude_vector:
            vector = layer.lora_magnitude_vector["default"].float()
            found[f"{name}.lora_magnitude_vector"] = vector.weight
    return found


def _factors(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _widen_heads(model: Any) -> None:
    """Heads are trained in float32 whatever the base is held in: small steps would be lost in half precision."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save["default"]
            head.float()
            head.register_forward_pre_hook(_in_float32)


def _in_float32(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)


def _whole_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    found: dict[str, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for inner, parameter in module.modules_to_save["default"].named_parameters():
                found[f"{name.removeprefix(PREFIX)}.{inner}"] = parameter
    return found
