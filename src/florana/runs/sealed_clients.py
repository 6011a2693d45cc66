"""The clients' part of secure sums, for all clients on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from florana.federation.local_engine import Memory
from florana.federation.messages import Step
from florana.federation.sealed_client import SealedClient, in_memory
from florana.recipe import schema as r
from florana.recipe.privacy_schema import sealing_of
from florana.secure.identities import made_up


def sealed_here(recipe: r.Recipe, rows: Mapping[str, int]) -> Callable[[str, Step, Memory], Step] | None:
    """(client, step, what it keeps) -> its answer; None where the recipe has no secure sums.

    Args:
        recipe: of the run.
        rows: client -> its training rows.
    """
    sealing = sealing_of(recipe)
    if sealing is None:
        return None
    sums = recipe.build_strategy().sums
    clients = {
        name: SealedClient(who, sealing, sums, rows[name], in_memory()) for name, who in made_up(sorted(rows)).items()
    }
    return lambda client, step, memory: clients[client].answer(step, lambda run, round_: memory)
