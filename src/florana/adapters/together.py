"""Several adapters opened for one sum: how their names meet, what card they share, or why they do not fit.

An adapter that lacks a module adds nothing to it: the sum runs over the union of the modules. A tensor that is trained
whole has no such zero, so all must have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from florana.adapters.peft_settings import SELECTION, SETTINGS
from florana.adapters.reader import AdapterCard, AdapterReader, Module, open_adapter, require_applied
from florana.adapters.wrappers import unwrapped_everywhere
from florana.errors import InputError

FROZEN = ".base_layer."
"""In the name of a tensor: a weight of the base that PEFT saves beside an embedding's factors. It is not trained."""

SAY_BASE = "if it is one model under two names, say --base NAME"

_FIXES = {
    "revision": SAY_BASE,
    "auto_mapping": "it names the class to load the base model by, and nothing else: null in one of the files will do",
}


def open_together(folders: Sequence[Path]) -> list[AdapterReader]:
    """The adapters; `module` inside a name is taken for a wrapper's where it makes the name another adapter's."""
    readers = [open_adapter(folder) for folder in folders]
    known = {name for reader in readers for name in reader.modules}
    return [
        open_adapter(reader.folder, unwrapped_everywhere)
        if any(name not in shared and unwrapped_everywhere(name) in known for name in reader.modules)
        else reader
        for reader, shared in zip(readers, _others(readers), strict=True)
    ]


def modules_of(readers: Sequence[AdapterReader]) -> dict[str, Module]:
    """Every adapted module of any adapter, sorted, as the first that has it describes it."""
    union: dict[str, Module] = {}
    for reader in readers:
        union |= {name: module for name, module in reader.modules.items() if name not in union}
    return dict(sorted(union.items()))


def common_card(readers: Sequence[AdapterReader], base: str | None) -> AdapterCard:
    """The card of a merge. Raises InputError where the adapters do not fit together; `base` settles another name."""
    base_model = base if base is not None else _same(readers, "base_model", SAY_BASE)
    union = modules_of(readers)
    for reader in readers:
        for name, module in reader.modules.items():
            other = union[name]
            if (module.shape, module.kind) != (other.shape, other.kind):
                first = next(r for r in readers if name in r.modules)
                raise InputError(
                    f"module '{name}' is {module.shape} ({module.kind}) in {reader.folder} but {other.shape} "
                    f"({other.kind}) in {first.folder}",
                    why="adapters of different base models cannot be combined",
                )
    _require_same_whole_tensors(readers)
    lora_bias = any(reader.card.lora_bias for reader in readers)
    embeddings = tuple(name for name, module in union.items() if module.kind == "embedding")
    if lora_bias and embeddings:
        raise InputError(
            f"{next(r.folder for r in readers if r.card.lora_bias)} has biases beside its factors B, and the embedding "
            f"'{embeddings[0]}' is adapted in {next(r.folder for r in readers if embeddings[0] in r.modules)}",
            why="PEFT loads no adapter with both",
        )
    card = replace(
        readers[0].card,
        base_model=base_model,
        task_type=_same([r for r in readers if r.card.task_type] or readers, "task_type"),
        fan_in_fan_out=_same(readers, "fan_in_fan_out"),
        target_modules=readers[0].card.target_modules,
        modules_to_save=tuple(sorted({name for reader in readers for name in reader.card.modules_to_save})),
        rslora=False,  # the scaling of every module is written out as alpha / r
        lora_bias=lora_bias,
        embeddings=embeddings,
        carried=_carried(readers, base),
    )
    if not _select_alike(readers):
        kept = {setting: value for setting, value in card.carried.items() if setting not in SELECTION}
        card = replace(card, target_modules=tuple(union), carried=kept)
    require_applied(union, card, "the adapters together")
    return card


def _others(readers: Sequence[AdapterReader]) -> list[set[str]]:
    """For each adapter, the modules of all others."""
    return [{name for other in readers if other is not reader for name in other.modules} for reader in readers]


def _select_alike(readers: Sequence[AdapterReader]) -> bool:
    """Whether one selection serves all: the same settings chose the same modules."""
    first = readers[0]
    return all(
        reader.modules.keys() == first.modules.keys()
        and reader.card.target_modules == first.card.target_modules
        and all(reader.card.carried.get(name) == first.card.carried.get(name) for name in SELECTION)
        for reader in readers
    )


def _carried(readers: Sequence[AdapterReader], base: str | None) -> dict[str, Any]:
    """The settings that go through. What is absent beside a name is that name; a switch must stand alike in all."""
    result: dict[str, Any] = {}
    for setting, rule in SETTINGS.items():
        if rule.rule != "carried" or (setting == "revision" and base is not None):
            continue
        if setting in SELECTION:
            value = readers[0].card.carried.get(setting)
        else:
            values = [(reader, reader.card.carried.get(setting)) for reader in readers]
            if setting != "ensure_weight_tying":
                values = [(reader, value) for reader, value in values if value is not None] or values[:1]
            first, value = values[0]
            for reader, other in values[1:]:
                if other != value:
                    off = False if setting == "ensure_weight_tying" else None
                    raise InputError(
                        f"{reader.folder} has {setting} {other or off!r} but {first.folder} has {value or off!r}",
                        fix=_FIXES.get(setting, ""),
                    )
        if value is not None:
            result[setting] = value
    return result


def _same(readers: Sequence[AdapterReader], field: str, fix: str = "") -> Any:
    first = readers[0]
    for reader in readers[1:]:
        ours, theirs = getattr(first.card, field), getattr(reader.card, field)
        if ours != theirs:
            why = "adapters of different base models cannot be combined" if field == "base_model" else ""
            raise InputError(
                f"{reader.folder} has {field} {theirs!r} but {first.folder} has {ours!r}", why=why, fix=fix
            )
    return getattr(first.card, field)


def _require_same_whole_tensors(readers: Sequence[AdapterReader]) -> None:
    """Every tensor trained whole stands in all; a frozen weight of the base may stand in some."""
    names = {name for reader in readers for name in reader.extra}
    for name in sorted(names):
        having = [reader for reader in readers if name in reader.extra]
        for reader in readers:
            if name not in reader.extra and FROZEN not in name:
                raise InputError(
                    f"{reader.folder} lacks the tensor '{name}', which {having[0].folder} has",
                    why="it is trained whole: what an adapter without it would bring is the base model's own, which is "
                    "not in the folder",
                )
        shapes = [reader.places[reader.extra[name]].shape for reader in having]
        for reader, shape in zip(having, shapes, strict=True):
            if shape != shapes[0]:
                raise InputError(f"tensor '{name}' is {shape} in {reader.folder} but {shapes[0]} in {having[0].folder}")


def notes_on(readers: Sequence[AdapterReader], names: Sequence[str], alive: set[int]) -> list[str]:
    """What is fine about the adapters but may not be meant: one that changes nothing, one that adapts fewer modules,
    heads that are averaged.

    Args:
        readers: the adapters.
        names: a short name for each.
        alive: the places of those that change something.
    """
    union = modules_of(readers)
    notes = []
    for u, (reader, name) in enumerate(zip(readers, names, strict=True)):
        if u not in alive:
            notes.append(f"{name} changes nothing: in every module its factor B (or A) is zero")
        lacks = [module for module in union if module not in reader.modules]
        if lacks:
            shown = ", ".join(lacks[:3]) + f" and {len(lacks) - 3} more" * (len(lacks) > 3)
            notes.append(
                f"{name} adapts {len(reader.modules)} of {len(union)} modules and adds nothing to the others ({shown})"
            )
    whole = sorted({name for reader in readers for name in reader.extra})
    if whole and len(readers) > 1:
        shown = ", ".join(whole[:4]) + f" and {len(whole) - 4} more" * (len(whole) > 4)
        notes.append(f"what is trained whole is no product, and is averaged with the weights: {shown}")
    return notes
