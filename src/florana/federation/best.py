"""Which of the measured rounds was the best on the rows to choose by, and whether it is time to stop.

Both are functions of the committed records alone, so a run that is killed and resumed chooses as one left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from florana.errors import RecipeError, nearest
from florana.federation.round_record import RoundRecord

LOWER_IS_BETTER = {"loss", "perplexity"}
"""Of all figures; the others are better when they are higher."""


def best_round(records: Sequence[RoundRecord], by: str) -> int | None:
    """The measured round with the best figure on the validation rows, the first of equal ones.

    Args:
        records: the committed rounds, in order.
        by: the name of the figure.

    Returns:
        The round's number; None before the first measured round, and where no figure was finite.

    Raises:
        RecipeError: the rounds have no such figure.
    """
    found: tuple[float, int] | None = None
    for round_, value in _values(records, by):
        if math.isfinite(value) and (found is None or value < found[0]):
            found = (value, round_)
    return found[1] if found is not None else None


def enough(records: Sequence[RoundRecord], by: str, patience: int | None) -> bool:
    """Whether the last `patience` measured rounds brought nothing better on the validation rows; never where it is
    None.

    Args:
        records: the committed rounds, in order.
        by: the name of the figure.
        patience: measured rounds in a row.

    Raises:
        RecipeError: the rounds have no such figure.
    """
    if patience is None:
        return False
    rounds = [round_ for round_, _ in _values(records, by)]
    best = best_round(records, by)
    return len(rounds) - (rounds.index(best) + 1 if best is not None else 0) >= patience


def up_to_kept(recipe: Mapping[str, Any], records: Sequence[RoundRecord]) -> Sequence[RoundRecord]:
    """The records up to the round whose adapter the run keeps: all of them, or those to the best one.

    Args:
        recipe: the run's, as a table.
        records: the committed rounds, in order.
    """
    asked = recipe.get("evaluate", {})
    if asked.get("keep") != "best":
        return records
    best = best_round(records, asked.get("by", "loss"))
    return records if best is None else [record for record in records if record.round <= best]


def _values(records: Sequence[RoundRecord], by: str) -> list[tuple[int, float]]:
    """(round, figure) of the measured rounds, signed so that less is better; what was not finite is written as None."""
    values = []
    for record in records:
        figures = record.eval.get("validation")
        if figures is None:
            continue
        if by not in figures:
            raise RecipeError(f"evaluate.by is {by!r}, which these rows do not have", fix=nearest(by, list(figures)))
        value = figures[by]
        sign = 1.0 if by in LOWER_IS_BETTER else -1.0
        values.append((record.round, math.nan if value is None else sign * value))
    return values
