"""The only joiner: a recipe becomes a model, data, clients, a strategy and an engine; the result is a run folder.

RUN/recipe.toml       resolved, runs again      RUN/environment.json  versions, hardware, seed
RUN/setup.json        who holds what, the starting model's score, sizes
RUN/rounds.jsonl      one line per committed round      RUN/checkpoint/  the last states
RUN/adapter/          the global adapter, as PEFT loads it      RUN/log.txt  warnings and tracebacks
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florana import recipe as r
from florana.adapter_files import replace_file
from florana.engine.local import LocalEngine
from florana.factors import Adapter
from florana.federation.journal import Journal, explained, read_records
from florana.federation.loop import Event, Federation, by_examples, run_rounds, uniformly
from florana.federation.records import RoundRecord
from florana.run_folder import check_folder, locked, logged
from florana.strategy.base import State, Strategy
from florana.strategy.ranks import with_ranks
from florana.train import beginnings
from florana.train.client import ClientData, TrainingClients
from florana.train.data import load_tables
from florana.train.evaluate import evaluate
from florana.train.exam import Exam, exam
from florana.train.model import Workbench
from florana.train.rows import rows_of
from florana.train.tasks import Example

WEIGHTINGS = {"examples": by_examples, "uniform": uniformly}

Show = Callable[[Event], None]


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything a run needs that does not depend on the strategy; strategies can be compared on one of it.

    Args:
        bench: the one model. start: the initial adapter (without the head where heads are personal).
        head: the tensors trained whole as they are at the start.
        clients: client -> its rows. common: the common test set.
        partition: who holds what, as written to setup.json.
        exam: the problems that the global model is scored on by what it writes, where the recipe asks for it.
        more: further common test sets, by the ending of their figures' names.
    """

    bench: Workbench
    start: Adapter
    head: Mapping[str, Tensor]
    clients: Mapping[str, ClientData]
    common: tuple[Example, ...]
    partition: Mapping[str, Any]
    exam: Exam | None = None
    more: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A finished run: its folder and the records of its rounds."""

    folder: Path
    records: tuple[RoundRecord, ...]


def prepare(recipe: r.Recipe) -> Setup:
    """Load the model and the data, deal out the rows, turn them into tokens. Writes nothing.

    Raises:
        InputError: anything about the model or the data that cannot be read or does not fit.
    """
    tables = load_tables(recipe.data, recipe.task, recipe.seed)
    bench = Workbench(recipe.model, recipe.task, tables.labels, recipe.seed)
    rows = rows_of(recipe, bench, tables)
    start = bench.adapter()
    return Setup(
        bench=bench,
        start=Adapter(start.modules) if recipe.model.personal else start,
        head=start.extra,
        clients=rows.clients,
        common=rows.common,
        partition=rows.facts,
        exam=exam(recipe, bench),
        more=rows.more,
    )


def execute(
    recipe: r.Recipe,
    folder: Path,
    *,
    setup: Setup | None = None,
    resume: bool = False,
    show: Show = lambda event: None,
    step: Callable[[str], None] = lambda client: None,
) -> Result:
    """Run a recipe into a folder, or continue the run that the folder holds.

    Args:
        setup: a `prepare`d set-up to use; it must come from a recipe that differs in the strategy at most.
        resume: continue; a folder without a committed round starts anew. Without it the folder must not exist.
        show: told of rounds, replies, refusals and commits. step: told of every optimizer step.

    Raises:
        RecipeError: the folder is taken, or was made by another recipe. InputError: model or data unusable.
        FederationError: too few usable updates, or the disk refused; the rounds committed before stand.
    """
    check_folder(recipe, folder, resume)
    setup = setup or prepare(recipe)
    strategy = strategy_of(recipe, setup)
    begun = strategy.init(begin(recipe, setup, strategy))
    with explained(folder, "the run folder could not be made"):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), logged(folder):
        journal = Journal(folder, setup.bench.card)
        last, mended = journal.recover()
        for line in mended:
            show(Event("mended", last.state.round if last else 0, detail=line))
        if last is None:
            with explained(folder, "the run folder could not be written"):
                _write_facts(recipe, folder, setup)
        elif resume:  # a recipe that asks for more rounds is the one that counts from here on
            replace_file(folder / "recipe.toml", recipe.to_toml().encode())
        state = last.state if last else begun
        if last is None:
            journal.export(state)
        engine = engine_of(recipe, setup, begun, last.memories if last else None, step)
        run_rounds(strategy, state, engine, federation_of(recipe, setup), journal, show)
    return Result(folder, tuple(read_records(folder / "rounds.jsonl")))


def engine_of(
    recipe: r.Recipe,
    setup: Setup,
    begun: State,
    memories: Mapping[str, Mapping[str, Tensor]] | None = None,
    step: Callable[[str], None] = lambda client: None,
) -> LocalEngine:
    """The clients of a set-up in the local engine; `begun` is the strategy's first state, which every client knows."""
    clients = TrainingClients(
        setup.bench,
        Adapter(begun.adapter.modules, setup.head, begun.adapter.cores),
        setup.clients,
        setup.common[: recipe.evaluate.personal_limit],
        recipe.train,
        recipe.evaluate,
        "personal" if recipe.model.personal else "average",
        step,
    )
    return LocalEngine(clients.fit, memories)


def strategy_of(recipe: r.Recipe, setup: Setup) -> Strategy:
    """The recipe's strategy, with the clients' own ranks where it gives them (in turn, by client name)."""
    strategy, ranks = recipe.build_strategy(), recipe.model.client_ranks
    if ranks is None:
        return strategy
    names = sorted(setup.clients)
    own = {client: ranks[index % len(ranks)] for index, client in enumerate(names)}
    return with_ranks(strategy, own, recipe.model.scaling_of)


def begin(recipe: r.Recipe, setup: Setup, strategy: Strategy) -> Adapter:
    """What the strategy's first state is made from: PEFT's start, or pairs from the base weights or their gradient."""
    if strategy.begin == "principal":
        return beginnings.principal(setup.bench, setup.start)
    if strategy.begin == "gradient":
        batches = {client: data.train[: recipe.train.batch_size] for client, data in setup.clients.items()}
        return beginnings.gradient(setup.bench, setup.start, batches)
    return setup.start


def global_scores(setup: Setup, adapter: Adapter, residual: Adapter | None, batch_size: int) -> dict[str, float]:
    """The scores of a server state on the common test set."""
    setup.bench.load(adapter, residual)
    scores = evaluate(setup.bench, setup.common, batch_size)
    for ending, rows in setup.more.items():
        scores |= {f"{name}_{ending}": value for name, value in evaluate(setup.bench, rows, batch_size).items()}
    return scores


def federation_of(recipe: r.Recipe, setup: Setup) -> Federation:
    """The fixed facts of a recipe's run, for the round loop."""
    rounds, every = recipe.federation.rounds, recipe.evaluate.every

    def asked(round_: int) -> bool:
        return setup.exam is not None and setup.exam.due(round_, rounds)

    def scores(state: State) -> Mapping[str, float]:
        figures = global_scores(setup, state.adapter, state.residual, recipe.evaluate.batch_size)
        # global_scores has left the state's model on the bench
        return figures | setup.exam.sit(setup.bench) if setup.exam is not None and asked(state.round) else figures

    personal: dict[str, Callable[[int], bool]] = {
        "never": lambda round_: False,
        "last": lambda round_: round_ == rounds,
        "every": lambda round_: round_ % every == 0 or round_ == rounds,
    }
    return Federation(
        clients=sorted(setup.clients),
        rounds=rounds,
        per_round=recipe.federation.clients_per_round or len(setup.clients),
        seed=recipe.seed,
        weights=WEIGHTINGS[recipe.federation.weighting],
        # A personal head leaves the server without one, so there is no global model to measure.
        evaluate=None if recipe.model.personal else scores,
        measured=lambda round_: round_ % every == 0 or round_ == rounds or asked(round_),
        personal=personal[recipe.evaluate.personal],
        minimum=recipe.federation.min_clients,
        examples={client: len(data.train) for client, data in setup.clients.items()},
    )


def _write_facts(recipe: r.Recipe, folder: Path, setup: Setup) -> None:
    scores = None
    if not recipe.model.personal:
        scores = global_scores(setup, setup.start, None, recipe.evaluate.batch_size)
    facts = {
        **setup.partition,
        "start": scores,
        "trainable_parameters": setup.start.parameters,
        "base_parameters": setup.bench.base_parameters,
        "common_test": len(setup.common),
    }
    replace_file(folder / "environment.json", (json.dumps(environment(recipe), indent=1) + "\n").encode())
    replace_file(folder / "setup.json", (json.dumps(facts, indent=1) + "\n").encode())
    replace_file(folder / "recipe.toml", recipe.to_toml().encode())  # last: its presence says the rest is there


def environment(recipe: r.Recipe) -> dict[str, Any]:
    """Versions, hardware and seed; no name of a person, machine or place."""
    names = ["florana", "torch", "transformers", "peft", "safetensors", "datasets", "flwr-datasets", "numpy"]
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": recipe.model.device,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "seed": recipe.seed,
    }
