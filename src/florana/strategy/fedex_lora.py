"""FedEx-LoRA: factor means plus the exact remainder (Singhal et al., arXiv 2410.09432, ACL 2025).

Trains A and B. Up r (out + in) numbers per module; down as many plus the remainder, of rank at most (U - 1) r a round
and min(out, in) over the rounds. The paper moves the base by the dense remainder; here it travels as a frozen
factored adapter, complete in every broadcast, so that a client that was absent needs nothing else. The server must
see every client's factors. `residual_rank` bounds the remainder: 0 is no option, None keeps it exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from florana.aggregate.residual import mean_and_remainder
from florana.errors import RecipeError
from florana.factors import Contribution
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, start


def build(residual_rank: int | None = None) -> Strategy:
    """The strategy.

    Args:
        residual_rank: the most terms of the remainder that are kept; all of them where not given.
    """
    if residual_rank is not None and residual_rank < 1:
        raise RecipeError(
            f"strategy.residual_rank is {residual_rank}, not at least 1", fix="use fedit for no remainder"
        )
    return Strategy("fedex-lora", "arXiv 2410.09432", start, broadcast, _Step(residual_rank))


@dataclass(frozen=True)
class _Step:
    rank: int | None

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        whole = mean_and_remainder(parts, state.residual, self.rank)
        ranks = [pair.rank for pair in whole.remainder.modules.values()]
        return Outcome(advance(state, whole.adapter, whole.remainder), {"residual_rank": max(ranks)})
