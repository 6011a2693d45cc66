"""A recipe's strategy, as the clients of a run know it."""

from __future__ import annotations

from collections.abc import Sequence

from florana.recipe import schema as r
from florana.strategy.base import Strategy
from florana.strategy.ranks import with_ranks


def strategy_of(recipe: r.Recipe, clients: Sequence[str]) -> Strategy:
    """The recipe's strategy, with the clients' own ranks where it gives them (in turn, by client name)."""
    strategy, ranks = recipe.build_strategy(), recipe.model.client_ranks
    if ranks is None:
        return strategy
    own = {client: ranks[index % len(ranks)] for index, client in enumerate(sorted(clients))}
    return with_ranks(strategy, own, recipe.model.scaling_of)
