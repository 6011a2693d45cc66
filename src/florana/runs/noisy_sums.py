"""[privacy] unit = "clients": noise on the sums over clients, drawn and charged by whoever leads the rounds."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from florana.dp.accounting import Mechanism, epsilon_of, noise_for
from florana.dp.ledger import Charge, Ledger, spent
from florana.dp.noise import Draws
from florana.errors import BudgetSpent, RecipeError
from florana.federation.hidden_part import Hiding, spread_of
from florana.federation.sampling import sample
from florana.federation.terms import Noising
from florana.recipe import schema as r
from florana.runs.private_runs import LEDGER, budget_of, mechanisms, site_ledger


def noising_of(recipe: r.Recipe, clients: Sequence[str], folder: Path, *, simulated: bool) -> Noising | None:
    """How sums get their noise; None where the recipe's unit is not clients.

    Who is asked in which round follows from the recipe's seed, which is no secret, so being sampled hides nobody: a
    client is charged for each round that it is asked in, and noise is computed for the most that any is.

    Args:
        recipe: of the run.
        clients: all names.
        folder: the run folder, in which the ledger lies.
        simulated: whether draws follow from the seed; else they are the system's, and no two are the same.

    Raises:
        RecipeError: no noise fits the budget, or delta is as large as one client's share.
    """
    own = recipe.privacy
    if own.unit != "clients" or own.secure_aggregation:
        return None
    sums, budget = recipe.build_strategy().sums, budget_of(recipe)
    assert sums is not None, "the recipe was checked"
    assert own.clip is not None, "the recipe was checked"
    if budget.delta >= 1 / len(clients):
        raise RecipeError(
            f"privacy.delta = {budget.delta:g} is no less than 1 / {len(clients)}, the share of one client",
            why="so large a delta allows that whole clients are told",
            fix=f"set it below {0.1 / len(clients):.1g}",
        )
    sigma, ledger = own.noise_multiplier, Ledger(folder / LEDGER)
    if sigma is None:
        sigma = noise_for(1.0, sums.trips * (own.max_rounds or _most(recipe, clients)), budget)
    once = Mechanism(1.0, sigma, sums.trips)

    def begin(round_: int, asked: Sequence[str], broadcast: bytes) -> Draws:
        ledger.begin()
        word = hashlib.sha256(f"{recipe.seed}\x1f{round_}\x1f".encode() + broadcast) if simulated else None
        name = word.hexdigest()[:24] if word else secrets.token_hex(12)
        for client in asked:
            before = [c for c in ledger.charges(client) if c.release != f"{name}-{client}"]
            after = epsilon_of([*(c.mechanism for c in before), once], budget.delta, budget.accountant)
            if after > budget.epsilon:
                raise BudgetSpent(
                    f"'{client}' was in {len(before)} rounds, and another would make epsilon {after:.4g} of "
                    f"{budget.epsilon:g}"
                )
        for client in asked:
            ledger.add(Charge(client, round_, f"{name}-{client}", once.rate, once.noise_multiplier, once.steps))
        return Draws(hashlib.sha256(b"draws" + word.digest()).digest() if word else secrets.token_bytes(32))

    def most() -> float:
        charges = ledger.charges()
        return max(spent([c for c in charges if c.client == name], budget) for name in {c.client for c in charges})

    return Noising(own.clip, sigma, begin, most)


def multipliers(recipe: r.Recipe, rows: Mapping[str, int]) -> dict[str, float]:
    """Client -> the noise multiplier that the recipe's budget takes; empty where it has none.

    Args:
        recipe: of the run.
        rows: client -> its training rows.

    Raises:
        RecipeError: no noise fits the budget, or delta is too large.
    """
    if recipe.privacy.unit != "clients":
        return {client: once.noise_multiplier for client, once in mechanisms(recipe, rows).items()}
    noising = noising_of(recipe, sorted(rows), Path(), simulated=True)
    return dict.fromkeys(rows, part_of(recipe).noise_multiplier if noising is None else noising.multiplier)


def part_of(recipe: r.Recipe) -> Mechanism:
    """What one part of one secure sum releases of a client: one of as many as there are trips and rounds.

    Raises:
        RecipeError: no noise fits the budget.
    """
    own, sums = recipe.privacy, recipe.build_strategy().sums
    assert sums is not None, "the recipe was checked"
    sigma = own.noise_multiplier
    if sigma is None:
        sigma = noise_for(1.0, sums.trips * (own.max_rounds or recipe.federation.rounds), budget_of(recipe))
    return Mechanism(1.0, sigma, 1)


def hiding_of(recipe: r.Recipe, client: str, folder: Path, *, simulated: bool) -> Hiding | None:
    """A client's own noise in secure sums, with its ledger; None where the recipe has none.

    Args:
        recipe: of the run, as the client reads it.
        client: its name.
        folder: the run folder, or where a site keeps what lasts.
        simulated: whether draws follow from the seed.

    Raises:
        RecipeError: no noise fits the budget.
        InputError: a site has taken part before, and its ledger is gone.
    """
    own = recipe.privacy
    if own.unit != "clients" or not own.secure_aggregation:
        return None
    assert own.clip is not None, "the recipe was checked"
    ledger = Ledger(folder / LEDGER) if simulated else site_ledger(folder)
    budget, part = budget_of(recipe), part_of(recipe)
    least = max(own.min_clients, recipe.federation.min_clients)
    if not simulated:
        ledger.begin()

    def require(parts: int, but: str = "") -> None:
        before = [charge.mechanism for charge in ledger.charges(client) if charge.release != but]
        after = epsilon_of([*before, *[part] * parts], budget.delta, budget.accountant)
        if after > budget.epsilon:
            raise BudgetSpent(
                f"the privacy budget of '{client}' is spent: {len(before)} sums, and {parts} more would make epsilon "
                f"{after:.4g} of {budget.epsilon:g}"
            )

    def begin(round_: int, attempt: int, trip: int) -> Draws:
        ledger.begin()
        word = hashlib.sha256(f"{recipe.seed}\x1f{client}\x1f{round_}\x1f{attempt}\x1f{trip}".encode())
        name, key = (word.hexdigest()[:24], word.digest()) if simulated else (secrets.token_hex(12), b"")
        require(1, name)
        ledger.add(Charge(client, round_, name, part.rate, part.noise_multiplier, part.steps))
        return Draws(hashlib.sha256(b"draws" + key).digest() if simulated else secrets.token_bytes(32))

    def enough(parts: int) -> None:
        ledger.begin()
        if not simulated:  # of a simulation that goes on, parts of this round may be charged already
            require(parts)

    def so_far() -> float:
        return spent(ledger.charges(client), budget)

    return Hiding(own.clip, spread_of(part.noise_multiplier, own.clip, least), begin, enough, so_far)


def _most(recipe: r.Recipe, clients: Sequence[str]) -> int:
    """The rounds of the client that is asked most often."""
    count = recipe.federation.clients_per_round or len(clients)
    asked = Counter(
        name
        for round_ in range(1, recipe.federation.rounds + 1)
        for name in sample(clients, count, recipe.seed, round_)
    )
    return max(asked.values())
