"""[privacy] unit = "examples": the noise that a recipe's budget takes, and the clients that add it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from florana.dp.accounting import Budget, Mechanism, noise_for
from florana.dp.ledger import Ledger
from florana.errors import InputError, RecipeError
from florana.federation.messages import Brief
from florana.recipe import schema as r
from florana.train.client import TrainingClients, rows_per_step, steps_per_round
from florana.train.cohort_probe import require_together
from florana.train.model import Workbench
from florana.train.private_clients import PrivateClients, Release, Watched, unwatched

LEDGER = "privacy.jsonl"
"""The ledger's name, in a run folder and in what a site keeps."""


def mechanisms(recipe: r.Recipe, rows: Mapping[str, int]) -> dict[str, Mechanism]:
    """Client -> what one round of it releases; empty where the recipe adds no noise at clients.

    Args:
        recipe: of the run.
        rows: client -> its training rows.

    Raises:
        RecipeError: no noise fits the budget, or delta is as large as one row's share.
    """
    own, found = recipe.privacy, {}
    if own.unit != "examples":
        return {}
    budget = budget_of(recipe)
    for client, count in rows.items():
        if count and budget.delta >= 1 / count:
            raise RecipeError(
                f"privacy.delta = {budget.delta:g} is no less than 1 / {count}, the share of one row of '{client}'",
                why="so large a delta allows that whole rows are told",
                fix=f"set it below {0.1 / count:.1g}",
            )
        steps, taken = steps_per_round(recipe.train, max(count, 1)), rows_per_step(recipe.train, max(count, 1))
        rate = taken / max(count, 1)
        sigma = own.noise_multiplier
        if sigma is None:
            sigma = noise_for(rate, steps * (own.max_rounds or recipe.federation.rounds), budget)
        found[client] = Mechanism(rate, sigma, steps)
    return found


def budget_of(recipe: r.Recipe) -> Budget:
    """What the recipe allows for each client's rows."""
    own = recipe.privacy
    assert own.epsilon is not None, "the recipe was checked"
    assert own.delta is not None, "the recipe was checked"
    return Budget(own.epsilon, own.delta, own.accountant)


def require_private(recipe: r.Recipe, bench: Workbench, folder: Path) -> None:
    """Begin the ledger in a folder, and see that the model gives every row a gradient of its own.

    Raises:
        InputError: it does not keep rows apart, or the ledger cannot be read.
        FederationError: the disk refused.
    """
    require_together(bench, recipe.model.base)
    ledger = Ledger(folder / LEDGER)
    ledger.begin()
    ledger.charges()


def private_here(
    recipe: r.Recipe,
    clients: TrainingClients,
    rounds: Mapping[str, Mechanism],
    folder: Path,
    watched: Watched = unwatched,
) -> PrivateClients:
    """The clients of a simulation. Their draws follow from the recipe's seed, as all of a simulation does.

    Args:
        recipe: of the run.
        clients: without privacy.
        rounds: of `mechanisms`.
        folder: the run folder.
        watched: see `PrivateClients`.
    """

    def released(brief: Brief) -> Release:
        words = f"{recipe.seed}\x1f{brief.client}\x1f{brief.round}\x1f{brief.attempt}\x1f{brief.seed}\x1f"
        found = hashlib.sha256(words.encode() + brief.payload)
        return Release(found.hexdigest()[:32], hashlib.sha256(b"draws" + found.digest()).digest())

    return replace(_private(recipe, clients, rounds, Ledger(folder / LEDGER), released), watched=watched)


def private_site(
    recipe: r.Recipe, clients: TrainingClients, rounds: Mapping[str, Mechanism], folder: Path
) -> PrivateClients:
    """A site's own part: draws that nobody else can make, and a ledger over all runs of its folder.

    Args:
        recipe: as the site reads it.
        clients: without privacy.
        rounds: of `mechanisms`.
        folder: where the site keeps what lasts.

    Raises:
        InputError: the site has taken part before, and its ledger is gone.
    """
    ledger = site_ledger(folder)
    require_private(recipe, clients.bench, folder)
    return _private(
        recipe, clients, rounds, ledger, lambda brief: Release(secrets.token_hex(16), secrets.token_bytes(32))
    )


def site_ledger(folder: Path) -> Ledger:
    """The ledger of a site, over all runs of what it keeps; begun by whoever uses it.

    Raises:
        InputError: the site has taken part before, and its ledger is gone.
    """
    ledger = Ledger(folder / LEDGER)
    if not ledger.path.exists() and folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{ledger.path} is missing, and {folder} shows that this site has taken part before",
            why="what was released of its rows so far is not known, so no epsilon can be stated",
            fix="restore the file from a copy; of rows that never left otherwise, begin with new keys",
        )
    return ledger


def _private(
    recipe: r.Recipe,
    clients: TrainingClients,
    rounds: Mapping[str, Mechanism],
    ledger: Ledger,
    released: Callable[[Brief], Release],
) -> PrivateClients:
    assert recipe.privacy.clip is not None, "the recipe was checked"
    return PrivateClients(clients, recipe.privacy.clip, budget_of(recipe), rounds, ledger, released)
