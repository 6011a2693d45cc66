"""oracle: the exact average of the clients' updates, whatever it costs: the control that shows what exactness buys.

The best rank-r part goes back as the LoRA factors that clients train, and what it leaves out travels beside it as a
second, frozen, factored adapter that grows with the rounds. So the clients' model is exactly the target, and it differs
from `best-rank` in nothing else. Up r (out + in) parameters per module; down as many plus the remainder, up to min(out,
in) ranks. A client that was absent needs only the current factors and remainder: both are complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.best_rank.truncate import divided, everything
from florana.lora.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, ranks_of, start
from florana.strategy.ranks import best_and_rest
from florana.strategy.residuals import residual_note

FACTS = facts.Facts(
    does="the exact average: the best adapter of rank r, and all the rest as a frozen part: the control",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR_AND_RESIDUAL,
    exact="exact",
    base="a frozen part beside the LoRA factors, new in every round",
    mixed_ranks="the best adapter of its own rank; all the rest frozen beside it",
    residual=lambda clients, rank, rounds: (clients * rounds - 1) * rank,
    coordinates="move",
    optimizer=("products",),
    aims_at_sum=True,
)


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("oracle", "the exact target, by definition", FACTS, start, broadcast, _step, cut=best_and_rest)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    whole = divided(parts, ranks_of(state.adapter), everything)
    return Outcome(advance(state, whole.adapter, whole.residual), residual_note(whole.residual))
