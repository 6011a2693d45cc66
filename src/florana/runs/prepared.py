"""A recipe's model and data, ready for any strategy; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from florana.lora.factors import Adapter
from florana.recipe import schema as r
from florana.train.client import ClientData
from florana.train.data.site_files import load_sites, site_files
from florana.train.data.sources import load_tables
from florana.train.data.tokenize import Example
from florana.train.examples import rows_of
from florana.train.generation_eval import GenerationBenchmark, generation_benchmark
from florana.train.model import Workbench
from florana.train.optimizer import require_optimizer
from florana.train.start_from import start_from


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything a run needs that does not depend on the strategy; strategies can be compared on one of it.

    Args:
        bench: the one model.
        start: the initial adapter (without the head where heads are personal).
        head: the tensors trained whole as they are at the start.
        clients: client -> its rows.
        common: the common test set.
        partition: who holds what, as written to setup.json.
        benchmark: the benchmark that the global model is scored on by what it generates, where the recipe asks for it.
        more: further common test sets, by the ending of their figures' names.
        validation: the rows to choose by, which are neither trained on nor scored; may be empty.
    """

    bench: Workbench
    start: Adapter
    head: Mapping[str, Tensor]
    clients: Mapping[str, ClientData]
    common: tuple[Example, ...]
    partition: Mapping[str, Any]
    benchmark: GenerationBenchmark | None = None
    more: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    validation: tuple[Example, ...] = ()

    @property
    def examples(self) -> dict[str, int]:
        """Client -> how many rows it trains on."""
        return {client: len(data.train) for client, data in self.clients.items()}


def prepare(recipe: r.Recipe, files: Mapping[str, Path] | None = None) -> Setup:
    """Load the model and the data, deal out the rows, turn them into tokens. Writes nothing.

    Args:
        recipe: the recipe of the run.
        files: client -> its own file, of the clients that are here (at a server none); None takes the recipe's.

    Raises:
        InputError: anything about the model or the data that cannot be read or does not fit.
    """
    if recipe.partition.kind == "sites" and files is None:
        files = site_files(recipe.data)
    if files is None:
        tables = load_tables(recipe.data, recipe.task, recipe.seed)
    else:
        tables = load_sites(recipe.data, recipe.task, recipe.seed, files)
    bench = Workbench(recipe.model, recipe.task, tables.labels, recipe.seed)
    require_optimizer(recipe.train, bench.device)
    rows = rows_of(recipe, bench, tables)
    start = bench.adapter()
    if recipe.model.adapter is not None:
        start = start_from(recipe.model.adapter, start)
        bench.load(start)
    return Setup(
        bench=bench,
        start=Adapter(start.modules) if recipe.model.personal else start,
        head=start.extra,
        clients=rows.clients,
        common=rows.common,
        partition=rows.facts,
        benchmark=generation_benchmark(recipe, bench),
        more=rows.more,
        validation=rows.validation,
    )
