"""What a client of a user's own Flower app does for methods that ask more than plain LoRA: two calls around training.

    receive(model, message, context)                     in the place of set_peft_model_state_dict
    ... the app's own training ...
    return reply(model, message, context, metrics)       in the place of ArrayRecord(get_peft_model_state_dict(model))

They work with every strategy of this package, and keep bfloat16 as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from florana.errors import InputError
from florana.flower.dropin.arrays import pack, unpack
from florana.flower.dropin.names import names_of
from florana.flower.dropin.replies import FLORANA, RESIDUAL, digest_of
from florana.lora.factors import LoraFactors, adapter_from_tensors, kind_of
from florana.train.hooks import Residual

KEPT = "florana-kept"
"""Key in the context's state of what a client trains and does not send."""

_HOOKS = "_florana_hooks"


@dataclass(frozen=True)
class _Brief:
    """A message's arrays and their key, the kinds to train and to send, the frozen part, the rank of this model."""

    key: str
    arrays: ArrayRecord
    trains: frozenset[str]
    returns: frozenset[str]
    residual: ArrayRecord | None
    rank: int | None


def receive(model: torch.nn.Module, message: Message, context: Context) -> None:
    """Put what the server sent into a PEFT model: factors, heads, the frozen part; freeze what is not to be trained.

    Where a method sends fewer components than the model's rank (FLoRIST), the layer's factors have as many until more
    come; so make the optimizer after this call.

    Args:
        model: a PEFT model with LoRA; its active adapter is set.
        message: what the server sent.
        context: the app's own; a factor that this client keeps to itself comes from its state.

    Raises:
        InputError: the message does not fit the model; the tensor and both shapes are named.
    """
    brief = _brief(message)
    names = names_of(brief.arrays)
    sent = unpack(brief.arrays)
    kept = context.state.array_records.get(KEPT)
    if kept is not None:
        sent |= unpack(kept, {name: sent[name] for name in kept if name in sent})
    parameters = _parameters(model)
    for key in sorted(parameters.keys() ^ sent.keys()):
        whose = "the model has no tensor" if key in sent else "the server sent no tensor"
        raise InputError(f"{whose} '{key}'", why="server and client were set up with different LoRA configurations")
    with torch.no_grad():
        for key, tensor in sent.items():
            parameter = parameters[key]
            if parameter.shape != tensor.shape and _fewer(model, key, tensor, parameter, brief.rank):
                parameter.data = torch.empty_like(tensor, dtype=parameter.dtype, device=parameter.device)
            if parameter.shape != tensor.shape:
                raise InputError(
                    f"tensor '{key}' is {tuple(tensor.shape)} at the server and {tuple(parameter.shape)} in the model",
                    fix="give both one rank, or name this client's rank in client_ranks",
                )
            parameter.copy_(tensor)
            kind = kind_of(names.canonical[key])
            parameter.requires_grad_(kind == "extra" or kind in brief.trains)
    _freeze_beside(model, brief.residual)


def reply(
    model: torch.nn.Module, message: Message, context: Context, metrics: Mapping[str, int | float | list[float]]
) -> Message:
    """The reply to a training message: what comes up of the adapter, in the types it was sent in, and the metrics.

    Args:
        model: the trained model.
        message: the message that is answered.
        context: the app's own; a factor that this client keeps to itself goes into its state.
        metrics: numbers by name; `num-examples` among them (or the strategy's `weighted_by_key`).
    """
    brief = _brief(message)
    names, types = names_of(brief.arrays), unpack(brief.arrays)
    parameters = _parameters(model)
    up: dict[str, Tensor] = {}
    stays: dict[str, Tensor] = {}
    for key, name in names.canonical.items():
        kind = kind_of(name)
        value = parameters[key].detach().to(types[key].dtype)
        if kind == "extra" or kind in brief.returns:
            up[key] = value
        elif kind in brief.trains:
            stays[key] = value
    if stays:
        context.state[KEPT] = pack(stays)
    content = RecordDict({brief.key: pack(up), "metrics": MetricRecord(dict(metrics))})
    if FLORANA in message.content:
        content[FLORANA] = ConfigRecord({"residual": digest_of(brief.residual)})
    return Message(content, reply_to=message)


def _brief(message: Message) -> _Brief:
    content = message.content
    keys = [key for key in content.array_records if key != RESIDUAL]
    if len(keys) != 1:
        raise InputError(f"the message brings {len(keys)} ArrayRecords; one adapter is expected")
    both = ConfigRecord({"trains": ["A", "B"], "returns": ["A", "B"]})
    said: Any = content.config_records.get(FLORANA, both)
    residual = content.array_records.get(RESIDUAL)
    return _Brief(
        keys[0],
        content.array_records[keys[0]],
        frozenset(said["trains"]),
        frozenset(said["returns"]),
        residual,
        said.get("rank"),
    )


def _fewer(model: torch.nn.Module, key: str, tensor: Tensor, parameter: Tensor, rank: int | None) -> bool:
    """Whether a factor differs from the model's by its number of components alone, and the layer's own rank is as
    said."""
    module, found, letter = key.partition(".lora_")
    if not found or rank is None or tensor.ndim != 2:
        return False
    terms, other = (0, 1) if letter.removeprefix("embedding_").startswith("A") else (1, 0)
    own = getattr(model.get_submodule(module), "r", {}).get(str(getattr(model, "active_adapter", "default")))
    return bool(own == rank and tensor.shape[terms] <= rank and tensor.shape[other] == parameter.shape[other])


def _parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """PEFT's key of a state dict -> the parameter of the model's active adapter."""
    active = re.escape(str(getattr(model, "active_adapter", "default")))
    factor = re.compile(rf"(.+\.lora_(?:embedding_)?[AB])\.{active}(\.weight)?", re.S)
    whole = re.compile(rf"(.+)\.modules_to_save\.{active}\.(.+)", re.S)
    found: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        match = factor.fullmatch(name)
        if match:
            found[match[1] + (match[2] or "")] = parameter
        elif match := whole.fullmatch(name):
            found[f"{match[1]}.{match[2]}"] = parameter
    return found


def _freeze_beside(model: torch.nn.Module, record: ArrayRecord | None) -> None:
    """Set the frozen part of the model's layers, in the place of the one before."""
    for hook in getattr(model, _HOOKS, ()):
        hook.remove()
    hooks = []
    if record is not None:
        tensors = unpack(record)
        frozen = adapter_from_tensors(tensors, {name.partition("/")[2]: 1.0 for name in tensors})
        layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
        for name, pair in frozen.modules.items():
            if name not in layers:
                raise InputError(f"the model has no module '{name}', for which the server sent a frozen part")
            hooks.append(layers[name].register_forward_hook(_residual(layers[name], pair)))
    setattr(model, _HOOKS, hooks)


def _residual(layer: torch.nn.Module, pair: LoraFactors) -> Residual:
    return Residual(pair, next(layer.parameters()).device)
