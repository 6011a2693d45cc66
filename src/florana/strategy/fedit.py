"""FedIT: factors averaged apart (Zhang et al., "Towards Building the Federated GPT", arXiv 2305.05644).

Trains A and B; r (out + in) parameters up and down per module; the base stays; the server's step is inexact.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.mean import mean
from florana.lora.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, start

FACTS = facts.Facts(
    does="averages A and B apart",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="inexact: the cross-client covariance of A and B",
    secure_aggregation="yes: sums of A and of B",
    optimizer=("factors", "products"),
)


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("fedit", "arXiv 2305.05644", FACTS, start, broadcast, _step)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, mean(parts)))
