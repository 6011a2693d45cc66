"""The server's part of a run over Flower: called by `florana serve`, or as the ServerApp of an exported app.

RUN/progress.jsonl has a line per event. Of an exported app, RUN/outcome.json says how it ended, for whoever started it
with Flower's own command.
"""

from __future__ import annotations

import functools
import json
import secrets
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from florana.atomic_files import explained, replace_file, without_torn_line
from florana.displayable import log
from florana.errors import FloranaError, InputError, RecipeError
from florana.federation.event import Event
from florana.federation.journal import first_rows, read_records
from florana.federation.messages import Engine, unpack_whole
from florana.federation.terms import Federation
from florana.flower.app.farewell import ended_frame, farewell
from florana.flower.app.flower_engine import FlowerEngine, Nodes, Note, unnoted
from florana.flower.app.registration import Registration
from florana.flower.app.settings import Settings, from_config
from florana.flower.app.site import agreed, common_of, starts_anywhere
from florana.flower.app.site_card import Common
from florana.flower.deploy.roster import read_roster
from florana.lora.factors import Adapter
from florana.recipe import schema as r
from florana.runs.chosen_strategy import strategy_of
from florana.runs.completions import write_completions
from florana.runs.noisy_sums import noising_of
from florana.runs.prepared import Setup, prepare
from florana.runs.rounds import Show, execute_rounds, journal_of, settled
from florana.runs.run_folder import OUTCOME, PROGRESS, RUN_NAME, check_folder, locked, read_facts
from florana.runs.setup import facts_of, federation_of, first_state
from florana.strategy.base import State, Strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the configuration that `florana flower export` declared."""
    recipe, settings = from_config(dict(context.run_config))
    folder = Path(settings.out)
    try:
        check_folder(recipe, folder, settings.resume)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            lead(grid, recipe, settings, folder, noted(folder))
    except FloranaError as error:
        _end(folder, error.exit_code, error.what, error.why, error.fix)
        log.error("%s", error)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        _end(folder, 1, f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    _end(folder, 0)


def lead(grid: Nodes, recipe: r.Recipe, settings: Settings, folder: Path, show: Show, note: Note = unnoted) -> None:
    """Register the clients, then run every round that the folder does not hold yet; `note` writes down what sites are
    asked and answer.

    Raises:
        FederationError: too few clients, at the start or in a round.
        RecipeError: the strategy needs the base model at the server, which has none.
        InputError: a model or data that cannot be read.
    """
    with settled(recipe, folder, show) as own:
        _lead(grid, own, settings, folder, show, note, named=recipe.threads)


def _lead(
    grid: Nodes, recipe: r.Recipe, settings: Settings, folder: Path, show: Show, note: Note, named: int | None
) -> None:
    """`named`: the number of threads that the operator's recipe asks of everybody."""
    roster = read_roster(Path(settings.roster)) if settings.roster else None
    keys = roster.keys if roster else None
    here = prepare(recipe, {} if recipe.partition.kind == "sites" else None) if settings.base else None
    run = _run_name(folder)

    def called(own: Common | None) -> Registration:
        everyone = agreed(recipe) | ({} if named is None else {"threads": named})
        rows = _rows_before(folder) | (roster.rows if roster else {})
        registration = Registration(grid, keys, everyone, own, settings.deadline, show, _computed(folder), rows)
        wanted = len(keys) if keys is not None else _simulated(grid, recipe)
        registration.wait(recipe.federation.min_clients, wanted, settings.wait)
        return registration

    if here is not None:
        clients = sorted(here.clients if keys is None else keys)
        strategy = strategy_of(recipe, clients)
        begun = first_state(recipe, here, starts_anywhere(strategy))
        registration = called(common_of(here, Adapter(begun.adapter.modules, here.head, begun.adapter.cores)))
    else:
        registration = called(None)
        clients = sorted(registration.cards if keys is None else keys)
        strategy = strategy_of(recipe, clients)
        begun = strategy.init(_from_a_client(recipe, strategy, registration))

    def engine(memories: Mapping[str, Mapping[str, Tensor]] | None) -> Engine:
        del memories  # they lie with the clients
        return FlowerEngine(grid, registration.connected, registration.doubt, run, settings.deadline, note)

    card = (
        replace(registration.common.adapter, base_model=recipe.model.hub_name or recipe.model.base)
        if here is None
        else here.bench.card
    )
    result = execute_rounds(
        recipe,
        folder,
        strategy,
        begun,
        card,
        engine,
        _terms(recipe, here, clients, registration, folder, run),
        lambda: _facts(recipe, here, registration, begun),
        show,
        here.partition.get("labels", ()) if here is not None else recipe.data.labels or (),
        here.bench.tokenizer if here is not None else None,
    )
    if keys is not None:  # of a simulation, all are on this machine
        kept = None
        if strategy.facts.one_model:
            try:
                kept = journal_of(recipe, folder, card).kept()
            except InputError as error:  # the run is done all the same
                show(Event("repaired", len(result.records), detail=f"sites get no adapter: {error.why}"))
        last = ended_frame(run, len(result.records), kept)
        farewell(grid, registration.connected()[0], last, settings.deadline, show)


def _terms(
    recipe: r.Recipe, setup: Setup | None, clients: Sequence[str], registration: Registration, folder: Path, run: str
) -> Federation:
    """The fixed terms, with the run's name, and with noise that nobody can repeat."""
    plain = federation_of(recipe, setup, clients, registration.examples, functools.partial(write_completions, folder))
    return replace(named_run(plain, run), noising=noising_of(recipe, clients, folder, simulated=False))


def named_run(federation: Federation, run: str) -> Federation:
    """The terms of a run, with its name where sums are secure: clients count by it what they have opened."""
    sealing = federation.sealing
    return federation if sealing is None else replace(federation, sealing=replace(sealing, run=run))


def _from_a_client(recipe: r.Recipe, strategy: Strategy, registration: Registration) -> Adapter:
    if strategy.begin != "lora":
        raise RecipeError(
            f"the strategy '{strategy.name}' needs the base model at the server",
            why="its start is made from the base weights",
            fix="let the server load it (run.base = true)",
        )
    start = unpack_whole(registration.start(), registration.common.scalings)
    return Adapter(start.modules) if recipe.model.personal else start


def _simulated(grid: Nodes, recipe: r.Recipe) -> int:
    """How many clients a simulation has; its nodes are there from the beginning."""
    nodes, clients = len(list(grid.get_nodes())), recipe.partition.clients
    if clients is not None and nodes != clients:
        raise RecipeError(
            f"the simulation has {nodes} nodes, and the recipe {clients} clients",
            fix=f"flwr run --federation-config 'num-supernodes={clients}'",
        )
    return nodes


def _computed(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """With what the clients of the run in the folder began; of a new run nothing."""
    path = folder / "setup.json"
    begun = (folder / "rounds.jsonl").exists() and path.exists()
    found = read_facts(path).get("computes", {}) if begun else {}
    return found if isinstance(found, dict) else {}


def _facts(recipe: r.Recipe, here: Setup | None, registration: Registration, begun: State) -> dict[str, Any]:
    partition = {
        "computes": {name: card.computes for name, card in sorted(registration.cards.items())},
        "labels": registration.common.labels,
        "clients": {
            name: card.holds.model_dump(exclude_none=True) for name, card in sorted(registration.cards.items())
        },
    }
    if here is not None:
        return facts_of(recipe, here, partition)
    return {
        **partition,
        "start": None,
        "trainable_parameters": begun.adapter.parameters,
        "base_parameters": registration.common.base_parameters,
        "common_test": 0,
    }


def _rows_before(folder: Path) -> dict[str, int]:
    """Client -> the training rows it had when this run first counted it; empty for a new run."""
    path = folder / "setup.json"
    clients = read_facts(path)["clients"] if path.exists() else {}
    return first_rows(read_records(folder / "rounds.jsonl")) | {
        name: holds["train"] for name, holds in clients.items() if "train" in holds
    }


def _run_name(folder: Path) -> str:
    """By which the clients keep what stays with them: made once, found again when the run is resumed."""
    path = folder / RUN_NAME
    if not path.exists():
        with explained(folder, "the run folder could not be made"):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"run": secrets.token_hex(16)}).encode())
    return str(read_facts(path)["run"])


def noted(folder: Path, show: Show = lambda event: None) -> Show:
    """A line of RUN/progress.jsonl for each event, before it is shown."""

    with explained(folder, "the run folder could not be written"):
        without_torn_line(folder / PROGRESS)

    def note(event: Event) -> None:
        line = {
            "time": time.time(),
            "kind": event.kind,
            "round": event.round,
            "client": event.client,
            "detail": event.detail,
        }
        with explained(folder, "the run folder could not be written"), (folder / PROGRESS).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        show(event)

    return note


def _end(folder: Path, code: int, what: str = "", why: str = "", fix: str = "") -> None:
    if folder.is_dir():
        content = {"exit_code": code, "what": what, "why": why, "fix": fix}
        replace_file(folder / OUTCOME, json.dumps(content, indent=1).encode())
