"""Merging adapters on disk: PEFT folders in, one PEFT folder out, with the error that the merge made.

Module by module: beside the result, no more than one module per thread (four at most) is in memory. The target is the
true weighted sum of the adapters' updates, sum_u w_u s_u B_u A_u, where an adapter adds nothing to a module that it
does not adapt; `stack` reaches it exactly, `best-rank` as nearly as
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

from florana.adapters.adapter_folder import write_adapter
from florana.adapters.beside import unlike_usage, write_common_files
from florana.adapters.hub import adapter_folder
from florana.adapters.merge_card import Merged, Source, coefficients, model_card, names_of
from florana.adapters.merge_rules import RULES, Rule, rule_of
from florana.adapters.reader import AdapterReader
from florana.adapters.together import FROZEN, common_card, modules_of, notes_on, open_together
from florana.aggregate.best_rank.exact import Answer, judged, relative
from florana.aggregate.best_rank.exact import nearest as nearest_pair
from florana.aggregate.error import ModuleError
from florana.aggregate.signed import weighted_sum, whole_tensor
from florana.aggregate.validate import is_finite
from florana.errors import InputError, RecipeError, nearest
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.other_names import method_hint

OF_MERGES = {"cat": "stack", "concat": "stack", "exact": "stack", "oracle": "stack", "fedex": "stack"}
"""What other tools, and florana's own strategies, call the merges."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    method: str = "best-rank",
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    normalize: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    scope: str | None = None,
    done: Callable[[int, int], None] = lambda count, total: None,
) -> Merged:
    """Merge PEFT adapter folders into a new one, with a model card that says what was merged and how exactly.

    Args:
        folders: PEFT LoRA folders on one base model; ranks, alphas and rsLoRA may differ.
        out: a folder that does not exist yet, or is empty.
        method: a name in `RULES`.
        rank: of the result, for `best-rank`; the largest of the inputs' where not given.
        weights: one per folder, finite; equal where not given. Tensors trained whole (heads) are averaged with them,
            which needs weights of sum 1.
        normalize: `on`, the weights are divided by their sum; `off`, they stand as they are. Where it is not given, on,
            and negative weights are refused.
        dtype: of the result; the widest of the inputs' where not given, tensor by tensor.
        base: the base model's name in the result, where the inputs spell it differently.
        scope: for `flora-na`, a name in `SCOPES`; `module` where it is not given.
        done: told of each finished module.

    Raises:
        RecipeError: an argument makes no sense, or `out` is taken.
        InputError: an adapter cannot be read or does not fit the others; the message names the folder, the module and
            both shapes.
    """
    places, out = [adapter_folder(Path(folder)) for folder in folders], Path(out)
    _check(places, out, method, rank, dtype)
    rule = rule_of(method, scope)
    shares = coefficients(weights, len(places), normalize)
    readers = open_together(places)
    card, union = common_card(readers, base), modules_of(readers)
    if card.carried.get("ensure_weight_tying") and card.embeddings and method in ("fedit", "flora-na"):
        raise RecipeError(
            f"--method {method} cannot merge adapters with ensure_weight_tying",
            why=f"the factors of '{card.embeddings[0]}' are the output layer's too, and would be averaged apart there",
            fix="use best-rank or stack",
        )
    wanted = rank if rank is not None else max(m.rank for reader in readers for m in reader.modules.values())
    answers: dict[str, Answer] = {}
    extra: dict[str, Tensor] = {}
    names = list(union)
    alive: set[int] = set()

    def one(name: str) -> Answer:
        stored = DTYPES[dtype] if dtype else widest_dtype(readers, name)
        return answer_of(readers, shares, name, rule, wanted, stored, alive)

    with _workers() as workers, ThreadPoolExecutor(max_workers=1) as hashing:
        digests = hashing.map(AdapterReader.sha256, readers)  # in step with the work: it needs no interpreter
        try:
            for count, (name, answer) in enumerate(zip(names, workers.map(one, names), strict=True), start=1):
                answers[name] = answer
                bias = _bias(readers, shares, name, answer.pair.scaling)
                if bias is not None:
                    extra[f"{name}.lora_B.bias"] = bias.to(answer.pair.B.dtype)
                done(count, len(names))
            for name in sorted({name for reader in readers for name in reader.extra}):
                whole = _whole_tensor(readers, shares, name)
                extra[name] = whole.to(DTYPES[dtype]) if dtype else whole
            sources = [_source(*item) for item in zip(names_of(places), readers, shares, digests, strict=True)]
        except BaseException:  # what waits is not begun any more
            hashing.shutdown(wait=False, cancel_futures=True)
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    merged = _merged(
        method if scope is None else f"{method}[scope={scope}]",
        answers,
        sources,
        [*notes_on(readers, names_of(places), alive), *unlike_usage(places)],
    )
    modules = {name: answer.pair for name, answer in answers.items()}
    _require_range(modules, extra)
    try:
        write_adapter(out, Adapter(modules, extra), card, model_card(merged, card))
        write_common_files(out, places)
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


def answer_of(
    readers: Sequence[AdapterReader],
    weights: Sequence[float],
    name: str,
    rule: Rule,
    rank: int,
    dtype: torch.dtype,
    alive: set[int],
) -> Answer:
    """One module merged, stored in `dtype`, and judged.

    For best-rank the adapters' factors are let go one by one, and the pair is the rule's own, byte for byte.

    The places of the adapters whose update of the module is not zero are added to `alive`.
    """
    everyone = enumerate(zip(readers, weights, strict=True))
    having = [(u, reader, weight) for u, (reader, weight) in everyone if name in reader.modules]

    def pair(u: int, reader: AdapterReader) -> LoraFactors:
        factors = reader.pair(name)
        if u not in alive and _moves(reader, name, factors):
            alive.add(u)
        return factors

    if rule is RULES["best-rank"]:
        return nearest_pair(((w, pair(u, reader)) for u, reader, w in having), rank, dtype)
    wide = torch.promote_types(widest_dtype(readers, name), torch.float32)
    parts = [
        Contribution(str(reader.folder), Adapter({name: _widened(pair(u, reader), wide)}), w) for u, reader, w in having
    ]
    if any(part.weight for part in parts):
        found = weighted_sum(lambda given: rule(given, rank), parts).modules[name]
    else:
        first = parts[0].adapter.modules[name]
        found = replace(first, B=torch.zeros_like(first.B))
    stored = LoraFactors(B=found.B.to(dtype), A=found.A.to(dtype), scaling=found.scaling)
    return judged(((part.weight, part.adapter.modules[name]) for part in parts), stored)


def _merged(method: str, answers: Mapping[str, Answer], sources: Sequence[Source], notes: Sequence[str]) -> Merged:
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
        notes=notes,
    )


def _check(
    folders: Sequence[Path],
    out: Path,
    method: str,
    rank: int | None,
    dtype: str | None,
) -> None:
    if method not in RULES:
        raise RecipeError(f"there is no merge method '{method}'", fix=method_hint(method, RULES, OF_MERGES))
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank} is not at least 1")
    if rank is not None and method != "best-rank":
        raise RecipeError(f"--rank has no meaning for '{method}'", fix="leave it out, or use --method best-rank")
    if not folders:
        raise RecipeError("no adapter was given")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"there is no dtype '{dtype}'", fix=nearest(dtype, DTYPES))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out {out} exists already", fix="name a new folder")
    above = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):  # said now, not after the work
        raise RecipeError(f"--out {out} cannot be made", why=f"{above} is no folder that can be written to")


def _moves(reader: AdapterReader, name: str, pair: LoraFactors) -> bool:
    """Whether the adapter changes the module's output at all."""
    bias = reader.bias(name)
    return bool(pair.B.any() and pair.A.any()) or (bias is not None and bool(bias.any()))


def _widened(pair: LoraFactors, dtype: torch.dtype) -> LoraFactors:
    return LoraFactors(B=pair.B.to(dtype), A=pair.A.to(dtype), scaling=pair.scaling)


def widest_dtype(readers: Sequence[AdapterReader], name: str) -> torch.dtype:
    """The type that holds every adapter's factors of one module without loss."""
    return functools.reduce(torch.promote_types, (reader.dtype(name) for reader in readers if name in reader.modules))


def _bias(readers: Sequence[AdapterReader], weights: Sequence[float], name: str, scaling: float) -> Tensor | None:
    """sum_u w_u s_u b_u / s: what a factor's bias adds to the output is linear, so its sum is exact."""
    if not any(reader.card.lora_bias for reader in readers):
        return None
    out = next(reader.modules[name].shape[0] for reader in readers if name in reader.modules)
    total = torch.zeros(out, dtype=torch.float64)
    for reader, weight in zip(readers, weights, strict=True):
        bias = reader.bias(name)
        if bias is not None:
            total += bias.double() * (weight * reader.modules[name].scaling / scaling)
    return total


def _whole_tensor(readers: Sequence[AdapterReader], weights: Sequence[float], name: str) -> Tensor:
    """The weighted sum of a tensor trained whole; a frozen weight of the base, which need not stand in all, itself."""
    tensors = [reader.tensor(reader.extra[name]) for reader in readers if name in reader.extra]
    if FROZEN in name:
        if all(torch.equal(tensor, tensors[0]) for tensor in tensors):
            return tensors[0]
        if len(tensors) < len(readers):
            raise InputError(
                f"the tensor '{name}' is a weight of the base model, but differs among the adapters that hold it",
                why="what it is for the adapters without it is not known",
            )
    return whole_tensor(name, tensors, weights)


def _require_range(modules: Mapping[str, LoraFactors], extra: Mapping[str, Tensor]) -> None:
    """Raise InputError naming a tensor that its type cannot hold."""
    factors = {f"{name}, factor {letter}": t for name, p in modules.items() for letter, t in (("B", p.B), ("A", p.A))}
    for name, tensor in {**factors, **extra}.items():
        if not is_finite(tensor):
            raise InputError(f"the sum of '{name}' leaves the range of {tensor.dtype}", fix="give a wider --dtype")


def _source(name: str, reader: AdapterReader, weight: float, sha256: Mapping[str, str]) -> Source:
    ranks = tuple(sorted({module.rank for module in reader.modules.values()}))
    return Source(name, weight, ranks, len(reader.modules), sha256)
