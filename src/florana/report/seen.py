"""What a report says of privacy: what the server saw of the clients, and what noise hides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from florana.recipe.privacy_words import privacy_said, spent_in
from florana.report.views import RunView


def seen_by_server(runs: Sequence[RunView]) -> str:
    """What the server saw, of all runs on the page."""
    hidden = [run.name for run in runs if _privacy(run).get("secure_aggregation")]
    noisy = [run.name for run in runs if _privacy(run).get("unit")]
    rest = "the adapter still tells something of the data it comes from."
    if not hidden:
        seen = "Clients' updates were visible to the server"
    elif len(hidden) == len(runs):
        seen = "The server saw sums over clients alone"
    else:
        seen = f"In {', '.join(hidden)} the server saw sums over clients alone; elsewhere each update"
    if len(noisy) == len(runs):
        return f"{seen}; rows are hidden by noise, as far as its epsilon goes."
    if noisy:
        return f"{seen}; in {', '.join(noisy)} rows are hidden by noise, as far as its epsilon goes."
    return (
        f"{seen}; no noise was added, and {rest}"
        if hidden
        else f"{seen}: LoRA updates do not hide the data they come from."
    )


def privacy_rows(run: RunView) -> list[tuple[str, str]]:
    """Lines for the table of settings: what the server saw, what noise hides and at what price; none without either."""
    own, rows = _privacy(run), []
    if own.get("secure_aggregation"):
        least, bits = own["min_clients"], own["bits"]
        rows += [("Server sees", f"sums over {least} clients or more, {bits} bits a number; no client's own part")]
    if own.get("unit"):
        spent = spent_in([record.notes for record in run.records])
        rows += [("Hidden", privacy_said(own, spent, run.setup.get("noise") == "seed"))]
    return rows


def _privacy(run: RunView) -> Any:
    return run.recipe.get("privacy", {})
