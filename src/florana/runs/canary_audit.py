"""An audit of a run's privacy: the run once more with canaries among its rows, and what its updates tell of them.

recipe -> rows + half of the canaries -> the same rounds, every update watched -> guesses -> epsilon at least
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from florana.atomic_files import explained, replace_file
from florana.dp.audit_bound import least_epsilon
from florana.errors import RecipeError
from florana.federation.journal import Journal
from florana.federation.loop import run_rounds
from florana.federation.messages import Brief
from florana.federation.sampling import derive
from florana.lora.factors import Adapter
from florana.recipe import schema as r
from florana.recipe.load import read_recipe
from florana.recipe.privacy_words import spent_in
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import Setup, prepare
from florana.runs.rounds import Show
from florana.runs.setup import engine_of, federation_of, first_state
from florana.runs.threads import threads
from florana.strategy.facts import CORE
from florana.train.canaries import Canaries, canaries, guessed, watch
from florana.train.client import ClientData

AUDIT = "audit.json"
"""The result's name in a run folder."""


@dataclass(frozen=True)
class Audited:
    """What came of it.

    Args:
        canaries: made up, over all clients; half of them were trained on.
        guesses: made of them.
        right: of the guesses.
        at_least: the epsilon that the run has at least, with 95 % confidence.
        stated: the recipe's budget.
        spent: the most on any client's rows, by the accountant; None where no round was done.
        delta: of all three.
        rounds: that were done.
    """

    canaries: int
    guesses: int
    right: int
    at_least: float
    stated: float
    spent: float | None
    delta: float
    rounds: int


def audit_run(folder: Path, count: int, changes: list[str], show: Show = lambda event: None) -> Audited:
    """Audit the recipe of a run folder, and write the result beside it (`audit.json`).

    Args:
        folder: the run folder; nothing else in it is changed.
        count: canaries for each client.
        changes: `key=value` over its recipe; with any, nothing is written down.
        show: told of the rounds.

    Raises:
        RecipeError: the folder is no run, or its recipe has no privacy budget.
        FederationError: the result cannot be written.
    """
    if not (folder / "recipe.toml").exists():
        raise RecipeError(f"{folder} is no run folder", fix="give the folder of a run whose recipe has privacy.unit")
    recipe = read_recipe(folder / "recipe.toml", changes)
    if recipe.privacy.unit is None:
        raise RecipeError(
            f"the recipe of {folder} has no privacy.unit, so no epsilon to hold it to",
            fix="audit a run with a budget, or give one: --set privacy.unit=examples, epsilon, delta, clip",
        )
    if recipe.build_strategy().facts.up is CORE:
        raise RecipeError(
            f"updates of '{recipe.strategy['name']}' are not watched: what is trained is a core between fixed factors",
            fix="audit another method under the same budget",
        )
    with threads(recipe.threads):
        found = audit(recipe, prepare(recipe), count, show)
    if not changes:
        with explained(folder, "the audit could not be written down"):
            replace_file(folder / AUDIT, (json.dumps(asdict(found), indent=1) + "\n").encode())
    return found


def audit(recipe: r.Recipe, setup: Setup, count: int, show: Show = lambda event: None) -> Audited:
    """The same for a set-up: every client gets `count` canaries, of which about half join its rows."""
    alone = recipe.engine.model_copy(update={"workers": 1})  # what is watched is in this process
    recipe = recipe.model_copy(update={"engine": alone})
    flocks = {
        client: canaries(own.train, count, derive(recipe.seed, "canaries", client))
        for client, own in setup.clients.items()
    }
    plain = setup.clients
    with_them = {client: _joined(own, flocks[client]) for client, own in setup.clients.items()}
    setup = replace(setup, clients=with_them)
    strategy = strategy_of(recipe, sorted(setup.clients))
    begun = first_state(recipe, setup, strategy)
    clip = recipe.privacy.clip or 0.0

    def watched(brief: Brief, received: Adapter, released: Mapping[str, Tensor]) -> None:
        own, others = flocks[brief.client], plain[brief.client].bins
        watch(own, others, setup.bench, received, released, recipe.train, sorted(brief.trains), clip)

    federation = replace(federation_of(recipe, setup, sorted(setup.clients), setup.examples), evaluate=None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        journal = Journal(Path(place), setup.bench.card)
        engine = engine_of(recipe, setup, begun, folder=Path(place), watched=watched)
        records: list[Mapping[str, object]] = []
        told = functools.partial(_noting, records, show)
        last = run_rounds(strategy, begun, engine, federation, journal, told)
    guesses, right = guessed(list(flocks.values()))
    own, rows = recipe.privacy, sum(len(flock.rows) for flock in flocks.values())
    return Audited(
        canaries=rows,
        guesses=guesses,
        right=right,
        at_least=least_epsilon(guesses, right, rows, own.delta or 0.0),
        stated=own.epsilon or 0.0,
        spent=spent_in(records),
        delta=own.delta or 0.0,
        rounds=last.round,
    )


def _joined(own: ClientData, flock: Canaries) -> ClientData:
    added = [row for row, inside in zip(flock.rows, flock.included, strict=True) if inside]
    return replace(own, train=[*own.train, *added], bins=[*own.bins, *added])


def _noting(records: list[Mapping[str, object]], show: Show, event: object) -> None:
    record = getattr(event, "record", None)
    if record is not None:
        records.append(record.notes)
    show(event)  # type: ignore[arg-type]
