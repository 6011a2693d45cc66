"""RoLoRA: B and A trained and averaged in turn (Chen et al., arXiv 2409.02346 and 2502.01755, NeurIPS 2025).

    odd rounds:   A fixed, B = sum_u w_u B_u        even rounds:   B fixed, A = sum_u w_u A_u

Each half-round is exact. The paper sends down only the factor that changed, to clients that never miss a round; here
both go down, so that a client that was absent needs nothing else. Up it is half of FedIT's.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.shared_factor import mean_of_A, mean_of_B
from florana.lora.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, Payload, State, Strategy, advance, start, work

FACTS = facts.Facts(
    does="averages B in odd rounds and A in even ones; the other factor stays",
    trains="B, A in turn",
    up=facts.IN_TURN,
    down=facts.PAIR,
    exact="exact in each round",
    mixed_ranks="refused: rows of A are averaged one by one",
    secure_aggregation="yes: sums of one factor",
    noise="linear in each round",
    trained=facts.IN_TURN.of,
    optimizer=("factors",),
    differs="both factors go down; published: the one that changed, to clients that miss no round",
)
TRAIN_B = work(trains=["B"], up=["B"], down=["A", "B"])
TRAIN_A = work(trains=["A"], up=["A"], down=["A", "B"])


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("rolora", "arXiv 2502.01755", FACTS, start, _brief, _step)


def _odd(state: State) -> bool:
    """Whether the round that begins at this state is the first, third, ...: B is still zero in the first."""
    return state.round % 2 == 0


def _brief(state: State, client: str) -> Payload:
    del client
    return Payload(state.adapter, work=TRAIN_B if _odd(state) else TRAIN_A)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    rule = mean_of_B if _odd(state) else mean_of_A
    return Outcome(advance(state, rule(parts, state.adapter)))
