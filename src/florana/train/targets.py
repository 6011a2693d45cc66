"""Which modules of a base model are adapted, and which are trained whole: of its structure alone, for runs and plans.

whole     what lies outside the base model (a classifier, its pooler), and what the checkpoint lacks: drawn at random at
          every loading, so that an adapter without it would be another model
adapted   the linear layers that the recipe names, without those
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import transformers

from florana.errors import InputError, nearest

PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""

ALL_LINEAR = "all-linear"
LINEAR = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)

ALWAYS_WHOLE = ("classifier", "score")
"""What PEFT trains whole in a classifier, whatever it is told."""
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict)
_PLAIN = (*LINEAR, torch.nn.Embedding, torch.nn.Bilinear, torch.nn.modules.conv._ConvNd)
_NO_LORA = {kind: {"out_proj", "conv1d"} for kind in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")}
"""Model type -> last parts of names that PEFT refuses: a fused kernel reads these weights past any adapter."""
_ROUTED = "expert|router|moe"
"""What stands in the names of a mixture's parts, or of their classes."""
_READ_AS_EXPERTS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""Last parts of names that PEFT takes for experts in many mixtures, also where another layer has them."""


def whole_modules(model: Any, missing: Collection[str], base: str) -> tuple[str, ...]:
    """The names of the modules of a classifier that are trained and saved whole, sorted.

    Args:
        model: with its head.
        missing: the parameters that its checkpoint lacks.
        base: the model's name, for messages.

    Raises:
        InputError: the checkpoint lacks parts of the base model itself, or a parameter that no module holds alone.
    """
    body = _body(model)
    lacked, alone = _largest(model, set(missing))
    refused = [*alone, *(name for name in lacked if _of_body(model, name, body))]
    if refused:
        raise InputError(
            f"the checkpoint of '{base}' lacks {_listed(refused)}",
            why="these would stay as they were drawn at random: part of the model itself is missing, not a head",
            fix="take a checkpoint of this architecture that is whole",
        )
    head = [
        name
        for name, module in model.named_children()
        if body and name != body and any(True for _ in module.parameters()) and not isinstance(module, _LISTS)
    ]
    return _wrapped(model, {*head, *lacked, *ALWAYS_WHOLE})


def adapted_modules(
    model: Any, wanted: str | Sequence[str], whole: Collection[str], base: str
) -> dict[str, torch.nn.Module]:
    """Name -> linear layer, of the modules that get LoRA, in the model's order.

    Args:
        model: the base model, with its head.
        wanted: last parts of names, a regular expression that matches whole names, or `all-linear`.
        whole: modules trained whole; nothing in them is adapted.
        base: the model's name, for messages.

    Raises:
        InputError: nothing or no linear layer matches; `all-linear` of a model whose experts are no linear layers, or
            with layers that PEFT cannot adapt.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    free = {name: module for name, module in modules.items() if not _inside(name, whole)}
    linear = {name: module for name, module in free.items() if isinstance(module, LINEAR)}
    if wanted == ALL_LINEAR:
        output = model.get_output_embeddings()
        chosen = {name: module for name, module in linear.items() if module is not output}
        _refuse_experts(model, chosen, base)
        if barred := sorted({last(name) for name in chosen} & _never(model)):
            raise InputError(
                f"model.target_modules = 'all-linear': PEFT cannot adapt {', '.join(barred)} of '{base}'",
                why="a fused kernel of this model reads the weights past any adapter",
                fix=f"set model.target_modules = {_as_list({last(name) for name in chosen} - _never(model))}",
            )
    elif isinstance(wanted, str):
        chosen = {name: module for name, module in free.items() if re.fullmatch(wanted, name)}
        if not any(re.fullmatch(wanted, name) for name in modules):
            raise InputError(
                f"model.target_modules: no module of the model '{base}' matches the pattern {wanted!r}",
                why="it must match the whole name, such as " + next((repr(name) for name in linear), ""),
                fix=r"for example '.*\.(query|value)'; a list of last parts matches without a pattern",
            )
    else:
        chosen = {name: module for name, module in free.items() if any(_ends(name, target) for target in wanted)}
        for target in wanted:
            if not any(_ends(name, target) for name in modules):
                raise InputError(
                    f"model.target_modules: the model '{base}' has no module '{target}'",
                    fix=nearest(target, {last(name) for name in linear}) if linear else "",
                )
    if not chosen:
        raise InputError(
            f"model.target_modules: nothing of '{base}' is left to adapt",
            why=f"trained whole, without LoRA: {', '.join(whole)}" if linear else "it has no linear layer",
            fix=f"choose among {', '.join(sorted({last(name) for name in linear}))}" if linear else "",
        )
    for name, module in chosen.items():
        if not isinstance(module, LINEAR):
            raise InputError(
                f"module '{name}' is no linear layer; florana adapts linear layers and Conv1D",
                fix=f"choose model.target_modules among {', '.join(sorted({last(n) for n in linear}))}",
            )
    return chosen


def last(name: str) -> str:
    """The last part of a dotted name."""
    return name.rsplit(".", 1)[-1]


def _experts(model: Any) -> Iterator[str]:
    """The names of parameters that hold the weights of several experts, or of a router that is no linear layer."""
    for path, module in model.named_modules():
        if isinstance(module, _PLAIN):
            continue
        kind = type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and re.search(_ROUTED, f"{path}.{name}.{kind}"):
                yield f"{path}.{name}"


def _refuse_experts(model: Any, chosen: Collection[str], base: str) -> None:
    """PEFT adapts such parameters through `target_parameters`, one factor for all experts: no plain product."""
    found = sorted(_experts(model))
    if not found:
        return
    never = _READ_AS_EXPERTS | _never(model)
    beside = {last(name) for name in chosen if not re.search(_ROUTED, name)} - never
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in found})
    raise InputError(
        f"model.target_modules = 'all-linear': '{base}' is a mixture of experts, and florana adapts no experts",
        why=f"their weights are no linear layers but the parameters {', '.join(kinds)}",
        fix=f"set model.target_modules = {_as_list(beside)}" if beside else "",
    )


def _never(model: Any) -> set[str]:
    return _NO_LORA.get(getattr(model.config, "model_type", ""), set())


def _body(model: Any) -> str:
    """The name of the base model below its head, '' where the head is part of it."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return prefix if prefix and isinstance(getattr(model, prefix, None), torch.nn.Module) else ""


def _largest(model: Any, missing: set[str]) -> tuple[list[str], list[str]]:
    """(the largest modules that lack all of their parameters, or a leaf that lacks some; lone parameters beside)."""
    modules: list[str] = []
    alone: list[str] = []

    def visit(name: str, module: torch.nn.Module) -> None:
        own = {key for key, _ in module.named_parameters(prefix=name)}
        if not own & missing:
            return
        whole = own <= missing and not isinstance(module, _LISTS)
        if name and (whole or not any(True for _ in module.children())):
            modules.append(name)
            return
        alone.extend(key for key, _ in module.named_parameters(prefix=name, recurse=False) if key in missing)
        for child, inner in module.named_children():
            visit(f"{name}.{child}" if name else child, inner)

    visit("", model)
    return modules, alone


def _of_body(model: Any, name: str, body: str) -> bool:
    """Whether a module is the base model's own rather than a head: it is repeated, holds what is, or embeds."""
    if body and name != body and not name.startswith(body + "."):
        return False
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    inner = model.get_submodule(name).modules()
    return any(isinstance(module, (*_LISTS, torch.nn.Embedding)) for module in (*above, *inner))


def _wrapped(model: Any, names: set[str]) -> tuple[str, ...]:
    """All modules that PEFT trains whole when told these names: every one whose name ends in the letters of one."""
    known = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    while names - found:
        found |= names
        names = {name for name in known if (PREFIX + name).endswith(tuple(found))}
    return tuple(sorted(name for name in names if not _inside(name, names - {name})))


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _as_list(names: Collection[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in sorted(names)) + "]"
