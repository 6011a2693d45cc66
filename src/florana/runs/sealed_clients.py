"""The clients' part of secure sums, for all clients on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from florana.federation.local_engine import Memory
from florana.federation.messages import Step
from florana.federation.terms import Sealing
from florana.recipe import schema as r


def sealing_of(recipe: r.Recipe) -> Sealing | None:
    """What the recipe says of secure sums; None where there are none."""
    own = recipe.privacy
    if not own.secure_aggregation:
        return None
    most = 1 if recipe.federation.weighting == "uniform" else own.max_rows or 1
    return Sealing(own.bits, most, max(own.min_clients, recipe.federation.min_clients), losses=own.unit is None)


def sealed_here(recipe: r.Recipe, rows: Mapping[str, int]) -> Callable[[str, Step, Memory], Step] | None:
    """(client, step, what it keeps) -> its answer; None where the recipe has no secure sums.

    Args:
        recipe: of the run.
        rows: client -> its training rows.
    """
    sealing = sealing_of(recipe)
    if sealing is None:
        return None
    # an extra's packages
    from florana.federation.sealed_client import SealedClient, in_memory
    from florana.secure.identities import made_up

    sums = recipe.build_strategy().sums
    clients = {
        name: SealedClient(who, sealing, sums, rows[name], in_memory()) for name, who in made_up(sorted(rows)).items()
    }
    return lambda client, step, memory: clients[client].answer(step, lambda run, round_: memory)
