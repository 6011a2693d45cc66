"""FedEx-LoRA: factor means plus the exact remainder (Singhal et al., arXiv 2410.09432, ACL 2025).

Trains A and B. Up r (out + in) parameters per module; down as many plus the remainder, of rank at most (U - 1) r a
round and min(out, in) over the rounds. The paper moves the base by the dense remainder; here it travels as a frozen
factored adapter, complete in every broadcast, so that a client that was absent needs nothing else. The server must
see every client's factors. `residual_rank` bounds the remainder: 0 is no option, None keeps it exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from florana.aggregate.remainder import mean_and_remainder
from florana.lora.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, start
from florana.strategy.residuals import check_residual_rank, residual_note

FACTS = facts.Facts(
    does="factor means, and their exact remainder as a frozen, factored residual (option `residual_rank`)",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR_AND_RESIDUAL,
    exact="exact, or the residual's tail where its rank is bounded",
    base="moves, as a factored residual of rank k",
    noise="in both factors: a product of noises, in the base for good",
    residual=lambda clients, rank, rounds: (clients - 1) * rank * rounds,
    optimizer=("products",),
    aims_at_sum=True,
    differs="published unweighted, here weighted; the remainder is factored beside the base, not dense in it",
)


def build(residual_rank: int | None = None) -> Strategy:
    """The strategy.

    Args:
        residual_rank: the most components of the remainder that are kept; all of them where not given.
    """
    check_residual_rank(residual_rank)
    made_of = facts.bounded(FACTS, residual_rank)
    return Strategy("fedex-lora", "arXiv 2410.09432", made_of, start, broadcast, _Step(residual_rank))


@dataclass(frozen=True)
class _Step:
    rank: int | None

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        whole = mean_and_remainder(parts, self.rank)
        return Outcome(advance(state, whole.adapter, whole.remainder), residual_note(whole.remainder))
