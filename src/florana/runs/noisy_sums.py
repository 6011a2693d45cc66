"""[privacy] unit = "clients": noise on the sums over clients, drawn and charged by whoever leads the rounds."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from florana.dp.accounting import Mechanism, epsilon_of, noise_for
from florana.dp.ledger import Charge, Ledger, spent
from florana.dp.noise import Draws
from florana.errors import BudgetSpent, RecipeError
from florana.federation.sampling import sample
from florana.federation.terms import Noising
from florana.recipe import schema as r
from florana.runs.private_runs import LEDGER, budget_of


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
    if own.unit != "clients":
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


def _most(recipe: r.Recipe, clients: Sequence[str]) -> int:
    """The rounds of the client that is asked most often."""
    count = recipe.federation.clients_per_round or len(clients)
    asked = Counter(
        name
        for round_ in range(1, recipe.federation.rounds + 1)
        for name in sample(clients, count, recipe.seed, round_)
    )
    return max(asked.values())
