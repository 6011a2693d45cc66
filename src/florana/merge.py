"""Merging adapters on disk: PEFT folders in, one PEFT folder out, with the error that the merge made.

Module by module: beside the result, no more than one module per thread (four at most) is in memory. The target is the
true weighted sum of the adapters' updates, sum_u w_u s_u B_u A_u; `stack` reaches it exactly, `best-rank` as nearly as
the rank allows.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from florana.adapter_files import write_adapter
from florana.adapter_reader import AdapterCard, AdapterReader, open_adapter
from florana.aggregate import component
from florana.aggregate.error import ModuleError
from florana.aggregate.inputs import normalised
from florana.aggregate.mean import mean
from florana.aggregate.measured import Answer, judged, relative
from florana.aggregate.measured import nearest as nearest_pair
from florana.aggregate.mix import mix
from florana.aggregate.project import best_rank
from florana.aggregate.stack import stack
from florana.errors import InputError, RecipeError, nearest
from florana.factors import Adapter, Contribution, LoraFactors
from florana.merged import Merged, Source, check_weights, model_card, names_of

Rule = Callable[[Sequence[Contribution], int], Adapter]

RULES: dict[str, Rule] = {
    "best-rank": best_rank,
    "stack": lambda parts, rank: stack(parts),
    "flora-na": lambda parts, rank: mix(parts).adapter,
    "fedit": lambda parts, rank: mean(parts),
}
"""Name -> the rule, of the contributions and the wanted rank (which only `best-rank` is free to choose)."""

SCOPES: dict[str, Rule] = {
    "module": RULES["flora-na"],
    "component": lambda parts, rank: mix(parts, solver=component.solve).adapter,
}
"""How far one of flora-na's coefficients reaches: a client's factor in a module, or one of its rank components."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(
    folders: Sequence[Path],
    out: Path,
    *,
    method: str = "best-rank",
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    base: str | None = None,
    scope: str | None = None,
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
        scope: for `flora-na`, a name in `SCOPES`; `module` where it is not given.
        done: told of each finished module.

    Raises:
        RecipeError: an argument makes no sense, or `out` is taken. InputError: an adapter cannot be read or does not
            fit the others; the message names the folder, the module and both shapes.
    """
    _check(folders, out, method, rank, weights, dtype)
    rule = _rule(method, scope)
    readers = [open_adapter(folder) for folder in folders]
    card = common_card(readers, base)
    shares = normalised(list(zip(map(str, folders), weights or [1.0] * len(folders), strict=True)))
    wanted = rank if rank is not None else max(m.rank for reader in readers for m in reader.modules.values())
    answers: dict[str, Answer] = {}
    extra: dict[str, Tensor] = {}
    names = list(readers[0].modules)

    def one(name: str) -> Answer:
        return _answer(readers, shares, name, rule, wanted, DTYPES[dtype] if dtype else widest_dtype(readers, name))

    with _workers() as workers, ThreadPoolExecutor(max_workers=1) as hashing:
        digests = hashing.map(AdapterReader.sha256, readers)  # in step with the work: it needs no interpreter
        try:
            for count, (name, answer) in enumerate(zip(names, workers.map(one, names), strict=True), start=1):
                answers[name] = answer
                bias = _bias(readers, shares, name, answer.pair.scaling)
                if bias is not None:
                    extra[f"{name}.lora_B.bias"] = bias.to(answer.pair.B.dtype)
                done(count, len(names))
            for name in readers[0].extra:
                extra[name] = _mean_tensor(readers, shares, name)
            sources = [_source(*item) for item in zip(names_of(folders), readers, shares, digests, strict=True)]
        except BaseException:  # what waits is not begun any more
            hashing.shutdown(wait=False, cancel_futures=True)
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    merged = _merged(method if scope is None else f"{method}[scope={scope}]", answers, sources)
    modules = {name: answer.pair for name, answer in answers.items()}
    try:
        write_adapter(out, Adapter(modules, extra), card, model_card(merged, card))
    except OSError as error:
        raise RecipeError(f"--out {out} cannot be written", why=error.strerror or str(error)) from None
    return merged


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that take one module each, as many as torch would use within one, four at most for the memory's sake.

    Modules are many and small: side by side they keep the cores busier than each does alone, and what comes out does
    not depend on how many threads there were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=min(threads, 4)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _answer(
    readers: Sequence[AdapterReader],
    shares: Sequence[float],
    name: str,
    rule: Rule,
    rank: int,
    dtype: torch.dtype,
) -> Answer:
    """One module merged and judged. For best-rank the adapters' factors are read and let go one by one."""
    if rule is best_rank:
        return nearest_pair(((w, reader.pair(name)) for w, reader in zip(shares, readers, strict=True)), rank, dtype)
    parts, _ = contributions_of(readers, shares, name)
    pair = rule(parts, rank).modules[name]
    stored = LoraFactors(B=pair.B.to(dtype), A=pair.A.to(dtype), scaling=pair.scaling)
    return judged(((part.weight, part.adapter.modules[name]) for part in parts), stored)


def _rule(method: str, scope: str | None) -> Rule:
    if scope is None:
        return RULES[method]
    if method != "flora-na":
        raise RecipeError(f"--scope has no meaning for '{method}'", fix="leave it out, or use --method flora-na")
    if scope not in SCOPES:
        raise RecipeError(
            f"there is no scope '{scope}' of a merge",
            why="modules are merged one by one, so no coefficient is shared by several of them",
            fix=f"one of {', '.join(SCOPES)}",
        )
    return SCOPES[scope]


def _merged(method: str, answers: Mapping[str, Answer], sources: Sequence[Source]) -> Merged:
    whole = math.fsum(answer.whole for answer in answers.values())
    return Merged(
        method=method,
        rank=max(answer.pair.rank for answer in answers.values()),
        error=relative(math.fsum(answer.missed for answer in answers.values()), whole) if whole else 0.0,
        optimum=relative(math.fsum(answer.least for answer in answers.values()), whole) if whole else 0.0,
        modules={
            name: ModuleError(a.error, a.optimum, a.whole / whole if whole else 0.0) for name, a in answers.items()
        },
        sources=sources,
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
    if not folders:
        raise RecipeError("no adapter was given")
    check_weights(weights, len(folders))
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"there is no dtype '{dtype}'", fix=nearest(dtype, DTYPES))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out {out} exists already", fix="name a new folder")
    above = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):  # said now, not after the work
        raise RecipeError(f"--out {out} cannot be made", why=f"{above} is no folder that can be written to")


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
    widest = widest_dtype(readers, name)
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


def widest_dtype(readers: Sequence[AdapterReader], name: str) -> torch.dtype:
    """The type that holds every adapter's factors of one module without loss."""
    return functools.reduce(torch.promote_types, (reader.dtype(name) for reader in readers))


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


def _source(name: str, reader: AdapterReader, weight: float, sha256: Mapping[str, str]) -> Source:
    ranks = tuple(sorted({module.rank for module in reader.modules.values()}))
    return Source(name, weight, ranks, sha256)
