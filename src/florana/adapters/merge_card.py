"""What a merge says of itself: the record of its inputs and errors, and the model card of the folder it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from florana.adapters.reader import AdapterCard
from florana.aggregate.error import ModuleError
from florana.errors import RecipeError


@dataclass(frozen=True)
class Source:
    """One merged adapter.

    Args:
        name: the folder's short name.
        weight: its factor in the sum.
        ranks: the ranks of its modules.
        modules: how many modules it adapts.
        sha256: file -> digest.
    """

    name: str
    weight: float
    ranks: tuple[int, ...]
    modules: int
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        method: the name of the rule.
        rank: the rank of the result.
        error: relative, over all modules.
        optimum: the least error that the rank allows, relative.
        modules: module -> its errors.
        sources: the merged adapters.
        notes: sentences on inputs that are fine but may not be what was meant.
    """

    method: str
    rank: int
    error: float
    optimum: float
    modules: Mapping[str, ModuleError]
    sources: Sequence[Source]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The merge as JSON's own types."""
        return asdict(self)


def model_card(merged: Merged, card: AdapterCard) -> str:
    """The README.md of the merged folder: what went in, by what rule, how exact; the same inputs give the same text."""
    rows = [
        f"| {source.name} | {source.weight:.4f} | {', '.join(map(str, source.ranks))} | {source.modules} |"
        for source in merged.sources
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
            "| adapter | weight | ranks | modules |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            *(line for note in merged.notes for line in (f"Note: {note}.", "")),
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

    Examples:
        >>> names_of([Path("/runs/north/adapter"), Path("/runs/south/adapter")])
        ['north/adapter', 'south/adapter']
    """
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        if len({path[-depth:] for path in paths}) == len(set(paths)):
            break
    return ["/".join(path[-depth:]) for path in paths]


def coefficients(weights: Sequence[float] | None, adapters: int, normalize: str | None) -> list[float]:
    """The factor of each adapter in the sum.

    Args:
        weights: finite; 1 each where None.
        adapters: how many adapters there are.
        normalize: `on`: divided by their sum. `off`: as they are. None: `on`, where no weight is negative.

    Raises:
        RecipeError: the weights are not one per adapter, not finite, all zero, or cannot be divided by their sum.

    Examples:
        >>> coefficients([3, 1], 2, None), coefficients([1, -0.5], 2, "off")
        ([0.75, 0.25], [1.0, -0.5])
    """
    if normalize not in (None, "on", "off"):
        raise RecipeError(f"--normalize is '{normalize}'", fix="on or off")
    given = [1.0] * adapters if weights is None else list(map(float, weights))
    if len(given) != adapters:
        raise RecipeError(
            f"--weights has {len(given)} for {adapters} adapter{'s' * (adapters != 1)}", fix="give one per adapter"
        )
    for weight in given:
        if not math.isfinite(weight):
            raise RecipeError(f"the weight {weight:g} in --weights is not a finite number")
    if not any(given):
        raise RecipeError("all --weights are zero", fix="give at least one adapter a weight")
    if normalize == "off":
        return given
    if max(map(abs, given)) > 1e300:
        raise RecipeError("the --weights are too large to be divided by their sum")
    total, size = math.fsum(given), math.fsum(map(abs, given))
    if normalize is None and min(given) < 0:
        raise RecipeError(
            f"the weight {min(given):g} in --weights is not a non-negative number",
            why="whether such weights are to be divided by their sum is not clear",
            fix="say --normalize off to take the weights as they are, or --normalize on to divide them by their sum",
        )
    if total <= 1e-9 * size:
        raise RecipeError(
            f"the --weights sum to {total:g}: they cannot be divided by that",
            why="the weights would grow without bound" if abs(total) <= 1e-9 * size else "every sign would turn",
            fix="say --normalize off to take the weights as they are",
        )
    return [weight / total for weight in given]
