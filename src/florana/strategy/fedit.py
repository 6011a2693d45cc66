"""FedIT: factors averaged apart (Zhang et al., "Towards Building the Federated GPT", arXiv 2305.05644).

Trains A and B; r (out + in) numbers up and down per module; the base stays; the server's step is inexact.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.mean import mean
from florana.factors import Contribution
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, start


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("fedit", "arXiv 2305.05644", start, broadcast, _step)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, mean(parts)))
