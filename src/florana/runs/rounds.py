"""Rounds into a run folder, from the first or from where a killed run stopped: the same for every engine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florana.adapters.adapter_folder import AdapterCard
from florana.atomic_files import explained, replace_file
from florana.errors import RecipeError
from florana.federation.event import Event
from florana.federation.journal import Journal, read_records
from florana.federation.loop import run_rounds
from florana.federation.messages import Engine
from florana.federation.round_record import RoundRecord
from florana.federation.terms import Federation
from florana.recipe import schema as r
from florana.recipe.usage import usage_of, write_usage
from florana.runs.model_card import write_card
from florana.runs.run_folder import locked, logged, read_environment, recorded_threads
from florana.runs.threads import instructions, threads
from florana.strategy.base import State, Strategy

Show = Callable[[Event], None]

Memories = Mapping[str, Mapping[str, Tensor]]
"""Client -> what it keeps to itself between rounds, by the names of `Adapter.tensors`."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder and the records of its rounds."""

    folder: Path
    records: tuple[RoundRecord, ...]


@contextmanager
def settled(recipe: r.Recipe, folder: Path, show: Show = lambda event: None) -> Iterator[r.Recipe]:
    """The recipe with its number of threads, which are taken meanwhile: what it names, or the run in the folder has,
    or, of a new run, what this process takes.

    Args:
        recipe: the recipe of the run.
        folder: the run folder; it need not exist.
        show: told, as `resumed`, of all on which the last bits depend and in which a run goes on otherwise than it
            began: with another number of threads than this process would take, other versions, another processor.

    Raises:
        InputError: the folder's own files cannot be read.
        RecipeError: `engine.workers` for a run that began with several threads.
    """
    here, recorded = torch.get_num_threads(), recorded_threads(folder)
    count = recipe.threads or recorded or (1 if recipe.engine.workers > 1 else here)
    if recipe.engine.workers > 1 and count != 1:
        raise RecipeError(
            f"engine.workers = {recipe.engine.workers}, but the run in {folder} began with {count} threads",
            why="its bytes would be others",
            fix="set engine.workers = 1",
        )
    if recorded is not None:
        if recipe.threads is None and recorded != here:
            show(Event("resumed", 0, detail=f"threads {recorded}, as it began (this process would take {here})"))
        for line in _otherwise(read_environment(folder), environment(recipe)):
            show(Event("resumed", 0, detail=f"{line}: the last bits may differ from those of a run left alone"))
    with threads(count):
        yield recipe.model_copy(update={"threads": count})


def execute_rounds(
    recipe: r.Recipe,
    folder: Path,
    strategy: Strategy,
    begun: State,
    card: AdapterCard,
    engine_with: Callable[[Memories | None], Engine],
    federation: Federation,
    facts: Callable[[], Mapping[str, Any]],
    show: Show = lambda event: None,
    labels: Sequence[str] = (),
    tokenizer: Any = None,
) -> Result:
    """Run the rounds that the folder does not hold yet; `run_folder.check_folder` was asked before.

    Args:
        recipe: as `settled` gives it.
        folder: the run folder.
        strategy: the strategy, with its options.
        begun: the strategy's first state.
        card: what the exported adapter says of itself.
        engine_with: the engine, given the client state of the last checkpoint.
        federation: the fixed facts of the run.
        facts: what setup.json holds, made only for a new run.
        show: told of rounds, replies, rejected updates and commits.
        labels: the classes' names, for those who use the adapter.
        tokenizer: the base's, which goes beside the adapter; None where there is none here.

    Raises:
        FederationError: too few usable updates, or the disk refused; the rounds committed before stand.
    """
    with explained(folder, "the run folder could not be made"):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), logged(folder):
        journal = journal_of(recipe, folder, card)
        last, repaired = journal.recover()
        for line in repaired:
            show(Event("repaired", last.state.round if last else 0, detail=line))
        with explained(folder, "the run folder could not be written"):
            if last is None:
                _write(folder / "environment.json", environment(recipe))
                _write(folder / "setup.json", facts())
            # last: its presence says the rest is there; a recipe that asks for more rounds counts from here on
            replace_file(folder / "recipe.toml", recipe.to_toml().encode())
        usage = usage_of(recipe, labels)
        with explained(folder, "the adapter folder could not be written"):
            if last is None:
                journal.export(begun)
            write_usage(folder / "adapter", usage)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / "adapter")
        engine = engine_with(last.memories if last else None)
        run_rounds(strategy, last.state if last else begun, engine, federation, journal, show)
        write_card(folder, usage)
    return Result(folder, tuple(read_records(folder / "rounds.jsonl")))


def journal_of(recipe: r.Recipe, folder: Path, card: AdapterCard) -> Journal:
    """The journal of a recipe's run, which keeps the adapter of the round that the recipe asks for."""
    return Journal(folder, card, recipe.evaluate.by if recipe.evaluate.keep == "best" else None)


def environment(recipe: r.Recipe) -> dict[str, Any]:
    """Versions, hardware and seed; no name of a person, machine or place."""
    names = ["florana", "torch", "transformers", "peft", "safetensors", "datasets", "flwr-datasets", "numpy"]
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "instructions": instructions(),
        "torch_threads": torch.get_num_threads(),
        "workers": recipe.engine.workers,
        "cohort": recipe.engine.cohort,
        "device": recipe.model.device,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "seed": recipe.seed,
    }


def _otherwise(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs of that on which the last bits depend, of all that was written down then."""
    kinds = [f"{name} {began.get(name)} -> {now[name]}" for name in ("machine", "instructions", "gpu")
             if name in began and began[name] != now[name]]  # fmt: skip
    before = began.get("versions", {})
    return kinds + [
        f"{name} {before[name]} -> {version}"
        for name, version in now["versions"].items()
        if before.get(name, version) != version
    ]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
