"""PEFT's names of an adapter's tensors, and florana's own: read off the record that a user's app begins with."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from florana.errors import InputError, RecipeError
from florana.lora.factors import Adapter, LoraFactors

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:(?P<letter>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<table>[AB]))", re.S)

ScalingOf = Callable[[str, int], float]
"""(module, rank) -> scaling."""


@dataclass(frozen=True)
class Names:
    """The tensors of one adapter under two names.

    Args:
        canonical: key in the record -> name of `Adapter.tensors`, in the order of the record.
    """

    canonical: Mapping[str, str]

    def adapter(self, tensors: Mapping[str, Tensor], scaling_of: ScalingOf) -> Adapter:
        """The adapter of a record's tensors. Raises InputError where A and B do not fit."""
        named = {name: tensors[key] for key, name in self.canonical.items()}
        modules = {}
        for name, tensor in named.items():
            kind, _, module = name.partition("/")
            if kind == "A":
                B = named.get(f"B/{module}")
                if B is None:
                    raise InputError(f"module '{module}' has a factor A and no B")
                modules[module] = LoraFactors(B=B, A=tensor, scaling=scaling_of(module, int(tensor.shape[0])))
            elif kind == "B" and f"A/{module}" not in named:
                raise InputError(f"module '{module}' has a factor B and no A")
            elif kind == "extra" and not tensor.is_floating_point():
                raise InputError(f"the tensor '{module}' is {tensor.dtype}: only floating-point tensors are averaged")
        return Adapter(modules, {n.removeprefix("extra/"): t for n, t in named.items() if n.startswith("extra/")})

    def record_names(self, adapter: Adapter) -> dict[str, Tensor]:
        """The adapter's tensors under the record's keys, in the record's order."""
        tensors = adapter.tensors()
        return {key: tensors[name] for key, name in self.canonical.items()}


def names_of(keys: Iterable[str]) -> Names:
    """What each key of a PEFT state dict denotes; what is no factor is a tensor trained whole.

    Raises:
        InputError: no factor at all, a tensor of a LoRA variant whose update is not B @ A, or two keys for one tensor.

    Examples:
        >>> names_of(["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"]).canonical
        {'base_model.model.q.lora_A.weight': 'A/q', 'base_model.model.q.lora_B.weight': 'B/q'}
    """
    canonical: dict[str, str] = {}
    for key in keys:
        bare = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(bare)
        if match:
            name = f"{match['letter'] or match['table']}/{match['module']}"
        elif ".lora_" in bare:
            raise InputError(
                f"no rule for the tensor '{key}'",
                why="only plain LoRA factors (lora_A, lora_B) are products B @ A; DoRA and biases are more",
            )
        else:
            name = f"extra/{bare}"
        if name in canonical.values():
            raise InputError(f"the tensor '{key}' stands in the record twice, under two names")
        canonical[key] = name
    if not any(name.startswith("A/") for name in canonical.values()):
        raise InputError(
            "the initial arrays hold no LoRA factors",
            why="no name ends in .lora_A.weight",
            fix="begin with ArrayRecord(get_peft_model_state_dict(model)), or florana.flower.pack of it",
        )
    return Names(canonical)


def peft_name(name: str) -> str:
    """PEFT's key of a name of `Adapter.tensors`.

    Examples:
        >>> peft_name("A/layer.0.q")
        'base_model.model.layer.0.q.lora_A.weight'
    """
    kind, _, rest = name.partition("/")
    return f"{PREFIX}{rest}" if kind == "extra" else f"{PREFIX}{rest}.lora_{kind}.weight"


def scaling_rule(lora_alpha: float | None, rslora: bool, scaling: float | Mapping[str, float] | None) -> ScalingOf:
    """How LoRA's scaling follows from what a PEFT configuration says: it does not travel with the tensors.

    Args:
        lora_alpha: alpha; the scaling is alpha / r, or alpha / sqrt(r) with `rslora`.
        rslora: whether the configuration says `use_rslora`.
        scaling: in the place of alpha: one number for every module and rank, or one per module.

    Raises:
        RecipeError: neither or both are given, or a number is not positive.
    """
    if (lora_alpha is None) == (scaling is None):
        raise RecipeError(
            "give lora_alpha or scaling, one of the two",
            why="alpha does not travel in a PEFT state dict; errors, residuals and heterogeneous ranks depend on it",
            fix="lora_alpha=config.lora_alpha (and rslora=True where use_rslora is on)",
        )
    if scaling is not None and rslora:
        raise RecipeError("rslora goes with lora_alpha, not with scaling")
    given = [lora_alpha] if lora_alpha is not None else scaling.values() if isinstance(scaling, Mapping) else [scaling]
    for number in given:
        if not isinstance(number, int | float) or not (math.isfinite(number) and number > 0):
            raise RecipeError(f"the LoRA scaling or alpha {number!r} is not a positive number")

    def scaling_of(module: str, rank: int) -> float:
        if lora_alpha is not None:
            return lora_alpha / (math.sqrt(rank) if rslora else rank)
        if not isinstance(scaling, Mapping):
            return float(scaling or 0.0)
        found = scaling.get(module, scaling.get(PREFIX + module))
        if found is None:
            raise RecipeError(f"scaling names no number for the module '{module}'")
        return float(found)

    return scaling_of
