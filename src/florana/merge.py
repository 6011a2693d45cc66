"""Merging adapters on disk: PEFT folders in, one PEFT folder out, with the error that the merge made.

Module by module: at no time is more than one module of all adapters in memory, beside the result. The target is the
true weighted sum of the adapters' updates, sum_u w_u s_u B_u A_u; `stack` reaches it exactly, `best-rank` as nearly as
the rank allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florana.adapter_files import write_adapter
from florana.adapter_reader import AdapterCard, AdapterReader, open_adapter
from florana.aggregate.error import ModuleError, measure
from florana.aggregate.inputs import normalised
from florana.aggregate.mean import mean
from florana.aggregate.mix import mix
from florana.aggregate.project import best_rank
from florana.aggregate.stack import stack
from florana.errors import InputError, RecipeError, nearest
from florana.factors import Adapter, Contribution, LoraFactors

Rule = Callable[[Sequence[Contribution], int], Adapter]

RULES: dict[str, Rule] = {
    "best-rank": best_rank,
    "stack": lambda parts, rank: stack(parts),
    "flora-na": lambda parts, rank: mix(parts).adapter,
    "fedit": lambda parts, rank: mean(parts),
}
"""Name -> the rule, of the contributions and the wanted rank (which only `best-rank` is free to choose)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def merge(
    folders: Sequence[Path],
    out: Path,
    *,
    method: str = "best-rank",
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    base: str | None = None,
    done: Callable[[int, int], None] = lambda count, total: None,
) -> Merged:
    """Merge PEFT adapter folders into a new one, with a model card that says what was merged and how exactly.

    Args:
        folders: PEFT LoRA folders on one base model; ranks, alphas and rsLoRA may differ.
        out: a folder that does not exist yet, or is empty.
        method: a name in `RULES`. rank: for `best-rank`; the largest of the inputs where it is not given.
        weights: one per folder, any scale; equal where not given. Extra tensors (heads) are averaged with them.
        dtype: of the result; the widest of the inputs' where not given.
        base: the base model's name in the result, where the inputs spell it differently.
        done: told of each finished module.

    Raises:
        RecipeError: an argument makes no sense, or `out` is taken. InputError: an adapter cannot be read or does not
            fit the others; the message names the folder, the module and both shapes.
    """
    _check(folders, out, method, rank, weights, dtype)
    readers = [open_adapter(folder) for folder in folders]
    card = common_card(readers, base)
    parts_weights = normalised(list(zip(map(str, folders), weights or [1.0] * len(folders), strict=True)))
    wanted = rank if rank is not None else max(m.rank for reader in readers for m in reader.modules.values())
    modules: dict[str, LoraFactors] = {}
    errors: dict[str, ModuleError] = {}
    extra: dict[str, Tensor] = {}
    squares: list[tuple[float, float, float]] = []
    names = list(readers[0].modules)
    for count, name in enumerate(names, start=1):
        parts, widest = contributions_of(readers, parts_weights, name)
        answer = RULES[method](parts, wanted)
        own_dtype = DTYPES[dtype] if dtype else widest
        pair = answer.modules[name]
        stored = LoraFactors(B=pair.B.to(own_dtype), A=pair.A.to(own_dtype), scaling=pair.scaling)
        error = measure(parts, Adapter({name: stored}))
        errors[name] = error.modules[name]
        squares.append((error.error, error.optimum, error.norm))
        modules[name] = stored
        bias = _bias(readers, parts_weights, name, pair.scaling)
        if bias is not None:
            extra[f"{name}.lora_B.bias"] = bias.to(own_dtype)
        done(count, len(names))
    for name in readers[0].extra:
        extra[name] = _mean_tensor(readers, parts_weights, name)
    total = math.fsum(size**2 for _, _, size in squares)
    merged = Merged(
        method=method,
        rank=max(pair.rank for pair in modules.values()),
        error=math.sqrt(math.fsum((e * size) ** 2 for e, _, size in squares) / total) if total else 0.0,
        optimum=math.sqrt(math.fsum((o * size) ** 2 for _, o, size in squares) / total) if total else 0.0,
        modules=errors,
        sources=[_source(reader, weight) for reader, weight in zip(readers, parts_weights, strict=True)],
    )
    write_adapter(out, Adapter(modules, extra), card, model_card(merged, card))
    return merged


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


def _check(
    folders: Sequence[Path],
    out: Path,
    method: str,
    rank: int | None,
    weights: Sequence[float] | None,
    dtype: str | None,
) -> None:
    if method not in RULES:
        raise RecipeError(f"there is no merge method '{method}'", fix=nearest(method, RULES))
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank} is not at least 1")
    if rank is not None and method != "best-rank":
        raise RecipeError(f"--rank has no meaning for '{method}'", fix="leave it out, or use --method best-rank")
    if weights is not None and len(weights) != len(folders):
        raise RecipeError(f"{len(weights)} weights for {len(folders)} adapters", fix="give one weight per adapter")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"there is no dtype '{dtype}'", fix=nearest(dtype, DTYPES))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out {out} exists already", fix="name a new folder")


def common_card(readers: Sequence[AdapterReader], base: str | None) -> AdapterCard:
    """The card of a merge. Raises InputError where the adapters do not fit together; `base` settles another name."""
    first = readers[0]
    for reader in readers[1:]:
        for name in first.modules.keys() ^ reader.modules.keys():
            lacks, has = (reader, first) if name in first.modules else (first, reader)
            raise InputError(f"{lacks.folder} lacks module '{name}', which {has.folder} has",
                             why="adapters of other target modules have no common sum")  # fmt: skip
        for name in first.extra.keys() ^ reader.extra.keys():
            lacks, has = (reader, first) if name in first.extra else (first, reader)
            raise InputError(f"{lacks.folder} lacks the tensor '{name}', which {has.folder} has")
        for name, module in first.modules.items():
            other = reader.modules[name]
            if (module.shape, module.kind) != (other.shape, other.kind):
                raise InputError(
                    f"module '{name}' is {other.shape} ({other.kind}) in {reader.folder} but {module.shape} "
                    f"({module.kind}) in {first.folder}",
                    why="adapters of different base models cannot be combined",
                )
        for field in ("base_model", "task_type", "fan_in_fan_out"):
            ours, theirs = getattr(first.card, field), getattr(reader.card, field)
            if ours != theirs and not (field == "base_model" and base is not None):
                raise InputError(
                    f"{reader.folder} has {field} {theirs!r} but {first.folder} has {ours!r}",
                    fix="if it is one model under two names, say --base NAME" if field == "base_model" else "",
                )
    same_targets = all(reader.card.target_modules == first.card.target_modules for reader in readers)
    return replace(
        first.card,
        base_model=base if base is not None else first.card.base_model,
        target_modules=first.card.target_modules if same_targets else tuple(first.modules),
        modules_to_save=tuple(sorted({name for reader in readers for name in reader.card.modules_to_save})),
        rslora=False,  # the scaling of every module is written out as alpha / r
        lora_bias=any(reader.card.lora_bias for reader in readers),
    )


def contributions_of(
    readers: Sequence[AdapterReader], weights: Sequence[float], name: str
) -> tuple[list[Contribution], torch.dtype]:
    """One module of every adapter as contributions in float32 or wider, and the widest dtype among them."""
    pairs = [reader.pair(name) for reader in readers]
    widest = pairs[0].A.dtype
    for pair in pairs:
        widest = torch.promote_types(widest, pair.A.dtype)
    wide = torch.promote_types(widest, torch.float32)
    parts = [
        Contribution(
            str(reader.folder),
            Adapter({name: LoraFactors(B=pair.B.to(wide), A=pair.A.to(wide), scaling=pair.scaling)}),
            weight,
        )
        for reader, pair, weight in zip(readers, pairs, weights, strict=True)
    ]
    return parts, widest


def _bias(readers: Sequence[AdapterReader], weights: Sequence[float], name: str, scaling: float) -> Tensor | None:
    """sum_u w_u s_u b_u / s: what a factor's bias adds to the output is linear, so its mean is exact."""
    total: Tensor | None = None
    for reader, weight in zip(readers, weights, strict=True):
        bias = reader.bias(name)
        if bias is not None:
            part = bias.float() * (weight * reader.modules[name].scaling / scaling)
            total = part if total is None else total + part
    if total is None and any(reader.card.lora_bias for reader in readers):
        total = torch.zeros(readers[0].modules[name].shape[0])
    return total


def _mean_tensor(readers: Sequence[AdapterReader], weights: Sequence[float], name: str) -> Tensor:
    tensors = [reader.tensor(reader.extra[name]) for reader in readers]
    for reader, tensor in zip(readers, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise InputError(f"tensor '{name}' is {tuple(tensor.shape)} in {reader.folder} but "
                             f"{tuple(tensors[0].shape)} in {readers[0].folder}")  # fmt: skip
    total = sum((w * tensor.double() for w, tensor in zip(weights, tensors, strict=True)), torch.zeros(()))
    return torch.as_tensor(total).to(tensors[0].dtype)


def _source(reader: AdapterReader, weight: float) -> Source:
    ranks = tuple(sorted({module.rank for module in reader.modules.values()}))
    return Source(reader.folder.resolve().name, weight, ranks, reader.sha256())
