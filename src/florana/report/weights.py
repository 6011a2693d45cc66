"""What a report says of how much each client counted: the weighting, the cap on one client, the robust rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from florana.federation.round_record import RoundRecord
from florana.report.views import RunView
from florana.robust.cap import usual, usual_under_a_rule

FULL = 1 - 1e-9
"""What a rule left a client counts as all of it from here on: shares are quotients of floats."""


def weight_rows(run: RunView) -> list[tuple[str, str]]:
    """Lines for the table of settings: the weights, and of the run's rounds who counted for less than that."""
    rounds, own = run.recipe["federation"], run.recipe.get("robust", {})
    basis = "by number of examples" if rounds["weighting"] == "examples" else "uniform"
    if run.recipe.get("privacy", {}).get("secure_aggregation"):  # the server sees no weights, so none is capped
        return [("Weights", basis)]
    rule = str(own.get("rule", "none"))
    most = rounds.get("max_weight")
    if most is None:
        most = (usual if rule == "none" else usual_under_a_rule)(max(len(record.clients) for record in run.records))
    rows = [("Weights", basis + (f", one client at most {most:.2g}" if most < 1 else ""))]
    capped = _by_client(run.records, lambda record: record.notes.get("capped", {}))
    if capped:
        rows += [("At the cap", _listed(capped, len(run.records), "asked for up to", max))]
    if rule != "none":
        counts = _by_client(run.records, lambda record: record.notes.get("robust", {}).get("counts", {}))
        less = {name: low for name, shares in counts.items() if (low := [s for s in shares if s < FULL])}
        held = _listed(less, len(run.records), "left down to", min) if less else "nobody was held back"
        rows += [("Robust rule", f"{rule}: {held}")]
    return rows


def _by_client(
    records: Sequence[RoundRecord], of: Callable[[RoundRecord], Mapping[str, Any]]
) -> dict[str, list[float]]:
    """Client -> its figure in each round that has one."""
    found: dict[str, list[float]] = {}
    for record in records:
        for client, value in of(record).items():
            found.setdefault(client, []).append(float(value))
    return found


def _listed(
    found: Mapping[str, Sequence[float]], rounds: int, words: str, extreme: Callable[[Sequence[float]], float]
) -> str:
    """The clients, most often first: in how many rounds, and the furthest figure; at most eight by name."""
    order = sorted(found, key=lambda client: (-len(found[client]), client))
    named = [
        f"{client} in {len(found[client])} of {rounds} rounds ({words} {extreme(found[client]):.2g})"
        for client in order[:8]
    ]
    return "; ".join(named) + (f"; and {len(order) - 8} more" if len(order) > 8 else "")
