"""Looking at adapters before merging them: what each is, how far apart they are, and what every choice would lose.

No model is loaded; module by module, as in a merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florana.adapters.hub import adapter_folder
from florana.adapters.merge import answer_of, widest_dtype
from florana.adapters.merge_card import coefficients, names_of
from florana.adapters.merge_rules import RULES
from florana.adapters.reader import AdapterReader
from florana.adapters.together import common_card, modules_of, notes_on, open_together
from florana.lora import linalg
from florana.lora.factors import LoraFactors


@dataclass(frozen=True)
class Sheet:
    """One adapter: what it says of itself, its sizes, and the Frobenius norm of its whole update.

    Args:
        name: a short name of the folder.
        base_model: the base model as the adapter names it.
        task: its task_type, empty where it does not say.
        targets: the last parts of the names of its modules, sorted.
        variant: `LoRA` or `rsLoRA`, and whether `with bias`.
        ranks: the ranks that occur, over all modules.
        scalings: the scalings that occur.
        dtypes: the types that occur.
        modules: how many modules it adapts.
        extra: the names of tensors trained whole.
        parameters: how many parameters its LoRA factors have.
        bytes: the size of its files, in bytes.
        norm: the Frobenius norm of its whole update.
    """

    name: str
    base_model: str
    task: str
    targets: tuple[str, ...]
    variant: str
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dtypes: tuple[str, ...]
    modules: int
    extra: tuple[str, ...]
    parameters: int
    bytes: int
    norm: float


@dataclass(frozen=True)
class Choice:
    """A merge that could be made: its relative error over all modules, and the bytes of the result in float32.

    Args:
        method: a name in `RULES`.
        rank: the rank of the result.
        error: the relative error over all modules.
        bytes: the size of the result in float32, in bytes.
    """

    method: str
    rank: int
    error: float
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """Everything `florana inspect` says.

    Args:
        sheets: one per adapter.
        overlap: [i][j], how much of the column spaces of two adapters' updates is common: the mean squared cosine of
            their principal angles over the modules that both adapt, 1 for the same space, 0 for orthogonal ones.
        energy: rank -> share of the squared norm of the weighted sum that the best adapter of that rank keeps.
        choices: what each method and rank would lose; empty for a single adapter.
        notes: sentences on adapters that change nothing, or adapt fewer modules than others.
    """

    sheets: Sequence[Sheet]
    overlap: Sequence[Sequence[float]]
    energy: dict[int, float]
    choices: Sequence[Choice]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON's own types."""
        return asdict(self)


def inspect(
    folders: Sequence[Path | str], weights: Sequence[float] | None = None, normalize: str | None = None
) -> Inspection:
    """Read the adapters' factors and compare them.

    Args:
        folders: PEFT LoRA folders; with more than one, on one base model.
        weights: one per adapter, of the sum that `energy` and `choices` speak of, as in `merge`; equal where not given.
        normalize: as in `merge`.

    Raises:
        RecipeError: as many weights as folders are needed.
        InputError: a folder cannot be read or does not fit.
    """
    places = [adapter_folder(Path(folder)) for folder in folders]
    shares = coefficients(weights, len(places), normalize)
    readers = open_together(places)
    common_card(readers, base=readers[0].card.base_model)
    norms = [0.0] * len(readers)
    dtypes: list[set[str]] = [set() for _ in readers]
    overlap, both = torch.zeros(2, len(readers), len(readers), dtype=torch.float64)
    tails: dict[int, float] = {}
    lost: dict[tuple[str, int], float] = {}
    sizes: dict[tuple[str, int], int] = {}
    whole = 0.0
    union = modules_of(readers)
    ranks = _ranks(readers)
    alive: set[int] = set()
    for name in union:
        having = [u for u, reader in enumerate(readers) if name in reader.modules]
        pairs = [readers[u].pair(name) for u in having]
        for u, pair in zip(having, pairs, strict=True):
            norms[u] += linalg.norm(linalg.stack([pair], [1.0])) ** 2
            dtypes[u] |= readers[u].stored(name)
        overlap[torch.tensor(having)[:, None], torch.tensor(having)] += _overlap(pairs)
        both[torch.tensor(having)[:, None], torch.tensor(having)] += 1
        values = linalg.singular_values(linalg.stack(pairs, [shares[u] for u in having])).square()
        whole += float(values.sum())
        for rank in ranks:
            tails[rank] = tails.get(rank, 0.0) + float(values[rank:].sum())
        _try_rules(readers, shares, name, ranks[0], lost, sizes, alive)
    overlap /= both.clamp_min(1)
    out_plus_in = sum(sum(module.shape) for module in union.values())
    choices = [
        Choice(method, rank, math.sqrt(square / whole) if whole else 0.0, sizes[method, rank])
        for (method, rank), square in lost.items()
    ]
    if len(readers) > 1:
        choices += [
            Choice("best-rank", rank, math.sqrt(tails[rank] / whole) if whole else 0.0, 4 * rank * out_plus_in)
            for rank in ranks
        ]
    return Inspection(
        sheets=[_sheet(*s) for s in zip(names_of(places), readers, map(math.sqrt, norms), dtypes, strict=True)],
        overlap=[[float(value) for value in row] for row in overlap],
        energy={rank: 1.0 - tail / whole if whole else 1.0 for rank, tail in tails.items()},
        choices=sorted(choices, key=lambda choice: (choice.bytes, -choice.error)) if len(readers) > 1 else [],
        notes=notes_on(readers, names_of(places), alive),
    )


def _ranks(readers: Sequence[AdapterReader]) -> list[int]:
    """The largest single rank, doubled until the stack's rank: 8, 16, 32, ... ."""
    first = max(module.rank for reader in readers for module in reader.modules.values())
    stacked = sum(max(module.rank for module in reader.modules.values()) for reader in readers)
    ranks = [first]
    while ranks[-1] * 2 < stacked:
        ranks.append(ranks[-1] * 2)
    return ranks


def _try_rules(
    readers: Sequence[AdapterReader],
    shares: Sequence[float],
    name: str,
    rank: int,
    lost: dict[tuple[str, int], float],
    sizes: dict[tuple[str, int], int],
    alive: set[int],
) -> None:
    """Add one module's squared error and bytes of every rule but best-rank; rules that need one rank may not apply."""
    dtype = torch.promote_types(widest_dtype(readers, name), torch.float32)
    one_rank = len({m.rank for reader in readers for m in reader.modules.values()}) == 1
    tied = any(reader.card.carried.get("ensure_weight_tying") and reader.card.embeddings for reader in readers)
    own = [reader.modules[name] for reader in readers if name in reader.modules]
    for method in ("fedit", "flora-na", "stack"):
        if method != "stack" and (tied or not one_rank):
            continue
        answer = answer_of(readers, shares, name, RULES[method], rank, dtype, alive)
        key = (method, rank if method != "stack" else sum(max(m.rank for m in r.modules.values()) for r in readers))
        lost[key] = lost.get(key, 0.0) + answer.missed
        sizes[key] = sizes.get(key, 0) + 4 * answer.pair.rank * sum(own[0].shape)


def _overlap(pairs: Sequence[LoraFactors]) -> Tensor:
    """The mean squared cosine of the principal angles between the column spaces of B_u A_u, over the smaller rank."""
    spaces = [linalg.decompose(linalg.stack([pair], [1.0])) for pair in pairs]
    bases = [d.left[:, d.values > 1e-7 * d.values[0]] if float(d.values[0]) > 0 else d.left[:, :0] for d in spaces]
    result = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for i, left in enumerate(bases):
        for j, right in enumerate(bases):
            smaller = min(left.shape[1], right.shape[1])
            result[i, j] = (left.T @ right).square().sum() / smaller if smaller else 0.0
    return result


def _sheet(name: str, reader: AdapterReader, norm: float, dtypes: set[str]) -> Sheet:
    modules = reader.modules.values()
    variant = "rsLoRA" if reader.card.rslora else "LoRA"
    if reader.card.lora_bias:
        variant += " with bias"
    return Sheet(
        name=name,
        base_model=reader.card.base_model,
        task=reader.card.task_type or "",
        targets=tuple(sorted({module.rpartition(".")[2] for module in reader.modules})),
        variant=variant,
        ranks=tuple(sorted({module.rank for module in modules})),
        scalings=tuple(sorted({module.scaling for module in modules})),
        dtypes=tuple(sorted(dtypes)),
        modules=len(reader.modules),
        extra=tuple(reader.extra),
        parameters=sum(module.rank * sum(module.shape) for module in modules),
        bytes=sum(path.stat().st_size for path in reader.files()),
        norm=norm,
    )
