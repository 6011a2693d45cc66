"""oracle: the exact average of the clients' updates, whatever it costs: the control that shows what exactness buys.

The best rank-r part goes back as the pair that clients train on, and what it leaves out travels beside it as a second,
frozen, factored adapter that grows with the rounds. So the clients' model is exactly the target, and it differs from
`best-rank` in nothing else. Up r (out + in) numbers per module; down as many plus the remainder, up to min(out, in)
ranks. A client that was absent needs only the current pair and remainder: both are complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.project import split
from florana.factors import Contribution
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, start
from florana.strategy.best_rank import rank_of


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("oracle", "the exact target, by definition", start, broadcast, _step)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    whole = split(parts, rank_of(state.adapter), state.residual)
    ranks = [pair.rank for pair in whole.remainder.modules.values()]
    return Outcome(advance(state, whole.adapter, whole.remainder), {"residual_rank": max(ranks)})
