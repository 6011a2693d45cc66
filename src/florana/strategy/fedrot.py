"""FedRot-LoRA: clients' factors turned to the last broadcast before averaging (arXiv 2602.23638, ICML 2026).

Trains A and B; r (out + in) numbers up and down per module, as FedIT; the base stays; U small SVDs of r x r at the
server, which must see every client's factors.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.rotate import rotated_mean
from florana.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, start

FACTS = facts.Facts(
    does="turns each client's factors to the last broadcast by Procrustes, then averages",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="no: what rotation explains of `fedit`'s error goes away",
    optimizer=("factors", "products"),
)


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("fedrot", "arXiv 2602.23638", FACTS, start, broadcast, _step)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, rotated_mean(parts, state.adapter)))
