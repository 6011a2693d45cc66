"""The clients' part of secure sums, for all clients on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from florana.federation.hidden_part import spread_of
from florana.federation.local_engine import Memory
from florana.federation.messages import Step
from florana.federation.terms import Sealing
from florana.recipe import schema as r
from florana.runs.noisy_sums import hiding_of, part_of


def sealing_of(recipe: r.Recipe) -> Sealing | None:
    """What the recipe says of secure sums; None where there are none."""
    own = recipe.privacy
    if not own.secure_aggregation:
        return None
    most = 1 if recipe.federation.weighting == "uniform" else own.max_rows or 1
    least = max(own.min_clients, recipe.federation.min_clients)
    if own.unit != "clients":
        return Sealing(own.bits, most, least, losses=own.unit is None)
    assert own.clip is not None, "the recipe was checked"
    spread = spread_of(part_of(recipe).noise_multiplier, own.clip, least)
    return Sealing(own.bits, most, least, losses=False, clip=own.clip, spread=spread)


def sealed_here(recipe: r.Recipe, rows: Mapping[str, int], folder: Path) -> Callable[[str, Step, Memory], Step] | None:
    """(client, step, what it keeps) -> its answer; None where the recipe has no secure sums.

    Args:
        recipe: of the run.
        rows: client -> its training rows.
        folder: the run folder, in which the ledger of their noise lies.
    """
    sealing = sealing_of(recipe)
    if sealing is None:
        return None
    # an extra's packages
    from florana.federation.sealed_client import SealedClient, in_memory
    from florana.secure.identities import made_up

    sums = recipe.build_strategy().sums
    clients = {
        name: SealedClient(
            who, sealing, sums, rows[name], in_memory(), hiding=hiding_of(recipe, name, folder, simulated=True)
        )
        for name, who in made_up(sorted(rows)).items()
    }
    return lambda client, step, memory: clients[client].answer(step, lambda run, round_: memory)
