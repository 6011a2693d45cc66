"""What a run's privacy is called in reports, cards and plans: unit, epsilon, delta, accountant, and no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ACCOUNTANTS = {"pld": "privacy loss distributions", "rdp": "Renyi's divergences"}

UNITS = {
    "examples": (
        "each training row, by noise at its client",
        "neighbours differ in one row, the number of rows is public",
    ),
    "clients": (
        "all that one client holds, by noise of the server's on sums, which sees the updates itself",
        "neighbours differ in one client, who is asked when is public",
    ),
    "clients sealed": (
        "all that one client holds, by noise of the clients' own in sums under masks",
        "neighbours differ in one client, who is asked when is public",
    ),
}
UNITS["examples sealed"] = UNITS["examples"]
"""What is hidden and how; from whom."""

FROM_SEED = "the noise follows from the recipe's seed: whoever has the recipe can take it off"
"""Of a simulation."""


def spent_in(notes: Sequence[Mapping[str, Any]]) -> float | None:
    """The most that was spent on any client's rows, of the rounds' notes; None where the server did not learn it."""
    told = [float(note["epsilon"]) for note in notes if "epsilon" in note]
    return max(told) if told else None


def budget_said(privacy: Mapping[str, Any]) -> str:
    """What a recipe allows.

    Examples:
        >>> budget_said({"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "accountant": "pld"})
        'epsilon = 8, delta = 1e-05, by privacy loss distributions; clip 1'
    """
    by = ACCOUNTANTS[privacy["accountant"]]
    return f"epsilon = {privacy['epsilon']:g}, delta = {privacy['delta']:g}, by {by}; clip {privacy['clip']:g}"


def privacy_said(privacy: Mapping[str, Any], spent: float | None, simulated: bool) -> str:
    """What may be said of a run whose recipe has a unit.

    Args:
        privacy: the recipe's section.
        spent: the most on any client's rows; None where the server did not learn it.
        simulated: whether the noise follows from the seed.

    Examples:
        >>> own = {"unit": "examples", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "accountant": "pld"}
        >>> privacy_said(own, 7.9712, False)
        'each training row, by noise at its client: epsilon = 7.972 was spent at most, delta = 1e-05, by privacy loss \
distributions; neighbours differ in one row, the number of rows is public, and other uses of the rows are not counted'
    """
    most = f"epsilon = {_up(spent)} was spent at most" if spent is not None else f"epsilon <= {privacy['epsilon']:g}"
    what, who = UNITS[privacy["unit"] + (" sealed" if privacy.get("secure_aggregation") else "")]
    return (
        f"{what}: {most}, delta = {privacy['delta']:g}, by {ACCOUNTANTS[privacy['accountant']]}; {who}, and other "
        "uses of the rows are not counted" + (f"; {FROM_SEED}" if simulated else "")
    )


def _up(value: float) -> str:
    """Rounded up to three decimals: what is said is never below what was spent."""
    return f"{math.ceil(value * 1000) / 1000:g}"
