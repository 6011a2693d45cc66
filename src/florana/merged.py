"""What a merge says of itself: the record of its inputs and errors, and the model card of the folder it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from florana.adapter_reader import AdapterCard
from florana.aggregate.error import ModuleError
from florana.errors import RecipeError


@dataclass(frozen=True)
class Source:
    """One merged adapter: the name of its folder, its share of the sum, its ranks, the digests of its files."""

    name: str
    weight: float
    ranks: tuple[int, ...]
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Merged:
    """What a merge did. `error` and `optimum` are relative, over all modules; `modules` holds each one's."""

    method: str
    rank: int
    error: float
    optimum: float
    modules: Mapping[str, ModuleError]
    sources: Sequence[Source]

    def to_json(self) -> dict[str, Any]:
        """The merge as JSON's own types."""
        return asdict(self)


def model_card(merged: Merged, card: AdapterCard) -> str:
    """The README.md of the merged folder: what went in, by what rule, how exact; the same inputs give the same text."""
    rows = [
        f"| {source.name} | {source.weight:.4f} | {', '.join(map(str, source.ranks))} |" for source in merged.sources
    ]
    worst = sorted(merged.modules.items(), key=lambda item: (-item[1].error, item[0]))[:5]
    digests = [f"- {s.name}/{name}: {digest}" for s in merged.sources for name, digest in s.sha256.items()]
    return "\n".join(
        [
            "---",
            f"base_model: {card.base_model}",
            "library_name: peft",
            "tags: [lora, merge, florana]",
            "---",
            "",
            f"# {len(merged.sources)} LoRA adapters merged by {merged.method}",
            "",
            f"Rank {merged.rank}. Relative error against the exact weighted sum of the adapters' updates: "
            f"{merged.error:.6f}; the least any adapter of that rank has: {merged.optimum:.6f}.",
            "",
            "| adapter | weight | ranks |",
            "|---|---:|---:|",
            *rows,
            "",
            "The modules with the largest errors:",
            "",
            *(f"- {name}: {error.error:.6f} (optimum {error.optimum:.6f})" for name, error in worst),
            "",
            "Digests of the inputs:",
            "",
            *digests,
            "",
        ]
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its own, with as many parents as tell the folders apart.

    >>> names_of([Path("/runs/north/adapter"), Path("/runs/south/adapter")])
    ['north/adapter', 'south/adapter']
    """
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        if len({path[-depth:] for path in paths}) == len(set(paths)):
            break
    return ["/".join(path[-depth:]) for path in paths]


def check_weights(weights: Sequence[float] | None, adapters: int) -> None:
    """Raises RecipeError unless the weights are one per adapter, none of them negative, not all of them zero."""
    if weights is None:
        return
    if len(weights) != adapters:
        raise RecipeError(
            f"--weights has {len(weights)} for {adapters} adapter{'s' * (adapters != 1)}", fix="give one per adapter"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise RecipeError(f"the weight {weight:g} in --weights is not a non-negative number")
    if not any(weights):
        raise RecipeError("all --weights are zero", fix="give at least one adapter a positive weight")
