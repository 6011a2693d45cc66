"""The ServerApp: the round loop of florana, with Flower's Grid as its engine and the run folder as its memory.

RUN/progress.jsonl has a line per event and RUN/outcome.json how it ended, for whoever started the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from florana import recipe as r
from florana.conduct import Show, conduct
from florana.errors import FederationError, FloranaError, RecipeError
from florana.factors import Adapter
from florana.federation.journal import first_rows
from florana.federation.loop import Event
from florana.federation.messages import Engine, unpack_whole
from florana.flower.card import Common
from florana.flower.engine import FlowerEngine
from florana.flower.keys import read_roster, read_rows
from florana.flower.roll import Roll
from florana.flower.settings import Settings, beside, from_config
from florana.flower.site import agreed, common_of, starts_anywhere
from florana.run import Setup, begin, facts_of, federation_of, prepare, strategy_of
from florana.run_folder import OUTCOME, PROGRESS, RUN_NAME, check_folder, held, is_free
from florana.strategy.base import State, Strategy
from florana.whole_files import explained, replace_file

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the configuration that `florana flower export` declared."""
    recipe, settings = from_config(dict(context.run_config))
    folder = Path(settings.out)
    with contextlib.ExitStack() as stack:
        if settings.guard:
            stack.enter_context(held(beside(Path(settings.guard)), FederationError("this run is led already"), 5.0))
            threading.Thread(target=end_when_free, args=(Path(settings.guard),), daemon=True).start()
        try:
            check_folder(recipe, folder, settings.resume)
            folder.mkdir(parents=True, exist_ok=True)
            lead(grid, recipe, settings, folder, _progress(folder))
        except FloranaError as error:
            _end(folder, error.exit_code, error.what, error.why, error.fix)
            logging.getLogger("florana").error("%s", error)
            raise SystemExit(error.exit_code) from None
        except Exception as error:
            _end(folder, 1, f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        _end(folder, 0)


def lead(grid: Grid, recipe: r.Recipe, settings: Settings, folder: Path, show: Show) -> None:
    """Call the roll, then run every round that the folder does not hold yet.

    Raises:
        FederationError: too few clients, at the start or in a round. RecipeError: the strategy needs the base model
            at the server, which has none. InputError: a model or data that cannot be read.
    """
    keys = read_roster(Path(settings.roster)) if settings.roster else None
    here = prepare(recipe, {} if recipe.partition.kind == "sites" else None) if settings.base else None
    run = _run_name(folder)

    def called(own: Common | None) -> Roll:
        rows = _rows_before(folder) | (read_rows(Path(settings.roster)) if settings.roster else {})
        roll = Roll(grid, keys, agreed(recipe), own, settings.deadline, show, rows)
        wanted = len(keys) if keys is not None else _simulated(grid, recipe)
        roll.wait(recipe.federation.min_clients, wanted, settings.wait)
        return roll

    if here is not None:
        clients = sorted(here.clients if keys is None else keys)
        strategy = strategy_of(recipe, clients)
        begun = strategy.init(begin(recipe, here, starts_anywhere(strategy)))
        roll = called(common_of(here, Adapter(begun.adapter.modules, here.head, begun.adapter.cores)))
    else:
        roll = called(None)
        clients = sorted(roll.cards if keys is None else keys)
        strategy = strategy_of(recipe, clients)
        begun = strategy.init(_from_a_client(recipe, strategy, roll))

    def engine(memories: Mapping[str, Mapping[str, Tensor]] | None) -> Engine:
        del memories  # they lie with the clients
        return FlowerEngine(grid, roll.connected, roll.doubt, run, settings.deadline)

    conduct(
        recipe,
        folder,
        strategy,
        begun,
        replace(roll.common.adapter, base_model=recipe.model.base) if here is None else here.bench.card,
        engine,
        federation_of(recipe, here, clients, roll.examples),
        lambda: _facts(recipe, here, roll, begun),
        show,
    )


def end_when_free(guard: Path) -> None:
    """End this process at once when nobody holds the guard any more: its operator's program was killed.

    Flower would leave it running, holding the run folder against the program that resumes. A commit is whole or
    absent at any moment, so nothing is lost.
    """
    while not is_free(guard):
        time.sleep(0.5)
    os._exit(FederationError.exit_code)


def _from_a_client(recipe: r.Recipe, strategy: Strategy, roll: Roll) -> Adapter:
    if strategy.begin != "lora":
        raise RecipeError(
            f"the strategy '{strategy.name}' needs the base model at the server",
            why="its start is made from the base weights",
            fix="let the server load it (run.base = true)",
        )
    start = unpack_whole(roll.start(), roll.common.scalings)
    return Adapter(start.modules) if recipe.model.personal else start


def _simulated(grid: Grid, recipe: r.Recipe) -> int:
    """How many clients a simulation has; its nodes are there from the beginning."""
    nodes, clients = len(list(grid.get_node_ids())), recipe.partition.clients
    if clients is not None and nodes != clients:
        raise RecipeError(
            f"the simulation has {nodes} nodes, and the recipe {clients} clients",
            fix=f"flwr run --federation-config 'num-supernodes={clients}'",
        )
    return nodes


def _facts(recipe: r.Recipe, here: Setup | None, roll: Roll, begun: State) -> dict[str, Any]:
    partition = {
        "labels": roll.common.labels,
        "clients": {name: card.holds.model_dump(exclude_none=True) for name, card in sorted(roll.cards.items())},
    }
    if here is not None:
        return facts_of(recipe, here, partition)
    return {
        **partition,
        "start": None,
        "trainable_parameters": begun.adapter.parameters,
        "base_parameters": roll.common.base_parameters,
        "common_test": 0,
    }


def _rows_before(folder: Path) -> dict[str, int]:
    """Client -> the training rows it had when this run first counted it; empty for a new run."""
    path = folder / "setup.json"
    clients = json.loads(path.read_text(encoding="utf-8"))["clients"] if path.exists() else {}
    return first_rows(folder / "rounds.jsonl") | {name: holds["train"] for name, holds in clients.items()}


def _run_name(folder: Path) -> str:
    """By which the clients keep what stays with them: made once, found again when the run is resumed."""
    path = folder / RUN_NAME
    if not path.exists():
        with explained(folder, "the run folder could not be made"):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"run": secrets.token_hex(16)}).encode())
    return str(json.loads(path.read_text(encoding="utf-8"))["run"])


def _progress(folder: Path) -> Show:
    def show(event: Event) -> None:
        line = {
            "time": time.time(),
            "kind": event.kind,
            "round": event.round,
            "client": event.client,
            "detail": event.detail,
        }
        with (folder / PROGRESS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    return show


def _end(folder: Path, code: int, what: str = "", why: str = "", fix: str = "") -> None:
    if folder.is_dir():
        content = {"exit_code": code, "what": what, "why": why, "fix": fix}
        replace_file(folder / OUTCOME, json.dumps(content, indent=1).encode())
