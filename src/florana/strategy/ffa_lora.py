"""FFA-LoRA: A frozen at its common random start, B trained and averaged (Sun et al., arXiv 2403.12313, ICLR 2024).

    B = sum_u w_u B_u,   so that   B A_0 = sum_u w_u B_u A_0 exactly

Half of FedIT's wire both ways; half of its capacity too. A client of a lower rank trains the first columns of B.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.shared_factor import mean_of_B
from florana.lora.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, sending, start, work
from florana.strategy.ranks import first_terms

FACTS = facts.Facts(
    does="averages B; A stays at its random start",
    trains="B",
    up=facts.ONLY_B,
    down=facts.ONLY_B,
    exact="exact",
    client_state="none: A comes from the recipe's seed",
    mixed_ranks="the first columns of B, with the first rows of A",
    secure_aggregation="yes: sums of B",
    trained=facts.ONLY_B.of,
    noise="in B alone: linear",
    optimizer=("factors",),
)
WORK = work(trains=["B"], up=["B"], down=["B"])


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("ffa-lora", "arXiv 2403.12313", FACTS, start, sending(WORK), _step, cut=first_terms)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, mean_of_B(parts, shared=state.adapter)))
