"""LoRA-FAIR: the mean A, and a B corrected towards the true average (Bian et al., arXiv 2411.14961, ICCV 2025).

Trains A and B; r (out + in) parameters up and down per module, as FedIT; the base stays. The correction is the ridge
form, in closed form; the paper minimises a cosine similarity with the same penalty by gradient descent. The server
must see every client's factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from florana.aggregate.fair import corrected_mean
from florana.errors import RecipeError
from florana.lora.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, start

FACTS = facts.Facts(
    does="the mean A, and a B corrected towards the true average (ridge form; option `penalty`)",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="inexact: between `best-rank` and `fedit`",
    optimizer=("factors", "products"),
    differs="the ridge form with its closed solution; published: a similarity and the penalty, by gradient descent",
)


def build(penalty: float = 0.01) -> Strategy:
    """The strategy.

    Args:
        penalty: lambda, relative to the mean eigenvalue of A A^T, at least 0; large values give FedIT.
    """
    if not (math.isfinite(penalty) and penalty >= 0):
        raise RecipeError(f"strategy.penalty is {penalty}, not a finite number of at least 0")
    return Strategy("lora-fair", "arXiv 2411.14961", FACTS, start, broadcast, _Step(penalty))


@dataclass(frozen=True)
class _Step:
    penalty: float

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        return Outcome(advance(state, corrected_mean(parts, self.penalty)))
