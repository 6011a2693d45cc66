"""What every rule checks before it computes: the contributions fit together, and their weights make sense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from florana.errors import InputError
from florana.lora.factors import Contribution, LoraFactors

Rank = int | Mapping[str, int]
"""One rank for all modules, or each module's own."""


def rank_in(rank: Rank, module: str) -> int:
    """The rank of a module.

    Examples:
        >>> rank_in(4, "q"), rank_in({"q": 2, "v": 8}, "v")
        (4, 8)
    """
    return rank if isinstance(rank, int) else rank[module]


def shares(parts: Sequence[Contribution]) -> list[float]:
    """The weights, scaled to sum 1 over the contributions. Raises InputError for none, negative or zero weights."""
    return normalised([(part.client, part.weight) for part in parts])


def normalised(weights: Sequence[tuple[str, float]]) -> list[float]:
    """The weights of (client, weight) pairs, scaled to sum 1. Raises InputError as `shares`."""
    if not weights:
        raise InputError("nothing to aggregate: no contribution was given")
    for client, weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            fix = "florana.weighted_sum takes weights of any sign, as they are" if math.isfinite(weight) else ""
            raise InputError(f"client '{client}': the weight {weight} is not a non-negative number", fix=fix)
    total = math.fsum(weight for _, weight in weights)
    if total <= 0:
        raise InputError("the weights of all contributions are zero", fix="give at least one a positive weight")
    return [weight / total for _, weight in weights]


def columns(parts: Sequence[Contribution]) -> dict[str, list[LoraFactors]]:
    """Module name -> the factors of every contribution, in their order.

    Raises:
        InputError: a client lacks a module, brings a foreign one, has another (out, in) shape, another dtype, or a
            value that is not finite; the message names the client, the module and both shapes.
    """
    result = matched(parts)
    for name, pairs in result.items():
        require_finite_factors(parts, name, pairs)
    return result


def matched(parts: Sequence[Contribution]) -> dict[str, list[LoraFactors]]:
    """As `columns`, without looking at the values: for rules that read every value once and check what comes out.

    Raises:
        InputError: as `columns`, but not for values that are not finite.
    """
    first = parts[0]
    for part in parts:
        if part.adapter.cores:
            raise InputError(f"client '{part.client}' brings cores between fixed factors, which this rule cannot mix",
                             fix="fold them first (florana.aggregate.cores.folded)")  # fmt: skip
    for part in parts[1:]:
        _same_names(first, part, first.adapter.modules, part.adapter.modules, "module")
        _same_names(first, part, first.adapter.extra, part.adapter.extra, "tensor")
    result: dict[str, list[LoraFactors]] = {}
    for name, expected in first.adapter.modules.items():
        pairs = [part.adapter.modules[name] for part in parts]
        for part, pair in zip(parts, pairs, strict=True):
            if pair.shape != expected.shape:
                raise InputError(
                    f"module '{name}' is {pair.shape} in client '{part.client}' but {expected.shape} in "
                    f"client '{first.client}'",
                    why="adapters of different base models cannot be combined",
                )
            if pair.A.dtype != expected.A.dtype:
                raise InputError(
                    f"module '{name}' is {pair.A.dtype} in client '{part.client}' but {expected.A.dtype} in "
                    f"client '{first.client}'"
                )
        result[name] = pairs
    return result


def require_finite_factors(parts: Sequence[Contribution], name: str, pairs: Sequence[LoraFactors]) -> None:
    """Raise InputError naming the client and the factor where one module's factors hold a NaN or an infinity."""
    for part, pair in zip(parts, pairs, strict=True):
        for letter, tensor in (("B", pair.B), ("A", pair.A)):
            require_finite(tensor, f"client '{part.client}', module '{name}', factor {letter}")


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite. The sum is tried first: one pass, nearly always enough."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def same_rank(parts: Sequence[Contribution], name: str, pairs: Sequence[LoraFactors], rule: str) -> int:
    """The common rank of one module. Raises InputError naming both shapes where a client has another rank."""
    for part, pair in zip(parts, pairs, strict=True):
        if pair.rank != pairs[0].rank:
            raise InputError(
                f"module '{name}': B is {tuple(pair.B.shape)} in client '{part.client}' but "
                f"{tuple(pairs[0].B.shape)} in client '{parts[0].client}'",
                why=f"{rule} combines the factors entry by entry and needs one rank",
                fix="use best-rank, which works on products, for heterogeneous ranks (flora-na pads the smaller ones)",
            )
    return pairs[0].rank


def output_scaling(pairs: Sequence[LoraFactors]) -> float:
    """The scaling of the result: the largest of the inputs, so that it does not depend on their order."""
    return max(pair.scaling for pair in pairs)


def unscaled(pairs: Sequence[LoraFactors], scaling: float) -> tuple[list[Tensor], list[Tensor]]:
    """(B_u * scaling_u / scaling, A_u) in at least float32, so that one output scaling serves all clients."""
    wide = torch.promote_types(pairs[0].A.dtype, torch.float32)
    return (
        [pair.B.to(wide) * (pair.scaling / scaling) for pair in pairs],
        [pair.A.to(wide) for pair in pairs],
    )


def average_extra(parts: Sequence[Contribution]) -> dict[str, Tensor]:
    """The weighted mean of the tensors that are trained whole (heads), in at least float32, cast back at the end."""
    return average(parts, [part.adapter.extra for part in parts], "tensor")


def average(parts: Sequence[Contribution], tables: Sequence[Mapping[str, Tensor]], what: str) -> dict[str, Tensor]:
    """The weighted mean of each tensor of the contributions' tables, in at least float32, cast back at the end.

    Raises:
        InputError: a client's tensor has another shape than the first one's, or a value that is not finite.
    """
    weights = shares(parts)
    result: dict[str, Tensor] = {}
    for name, expected in tables[0].items():
        wide = torch.promote_types(expected.dtype, torch.float32)
        total = torch.zeros_like(expected, dtype=wide)
        for part, table, weight in zip(parts, tables, weights, strict=True):
            tensor = table[name]
            if tensor.shape != expected.shape:
                raise InputError(
                    f"{what} '{name}' is {tuple(tensor.shape)} in client '{part.client}' but "
                    f"{tuple(expected.shape)} in client '{parts[0].client}'"
                )
            require_finite(tensor, f"client '{part.client}', {what} '{name}'")
            total += weight * tensor.to(wide)
        result[name] = total.to(expected.dtype)
    return result


def require_finite(tensor: Tensor, where: str) -> None:
    """Raise InputError unless every entry is finite."""
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{where}: {bad} of {tensor.numel()} values are not finite (NaN or infinite)")


def _same_names(
    first: Contribution,
    part: Contribution,
    ours: Mapping[str, object],
    theirs: Mapping[str, object],
    kind: str,
) -> None:
    for name in ours.keys() - theirs.keys():
        raise InputError(f"client '{part.client}' lacks {kind} '{name}', which client '{first.client}' has")
    for name in theirs.keys() - ours.keys():
        raise InputError(f"client '{part.client}' brings {kind} '{name}', which client '{first.client}' lacks")
