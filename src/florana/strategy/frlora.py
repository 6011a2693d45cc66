"""FRLoRA: factor means accumulated in the base, factors always begun at its principal vectors (Yan et al., ICLR 2025).

    B_0 A_0 = the best rank-r part of W;  clients begin every round at it, beside the base without it
    W <- W + s B_avg A_avg - s B_0 A_0

The change of the base is a frozen, factored residual, minus the first factors at the start, so that the first model is
the pre-trained one. Written from the abstract and notes: the paper's text was not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from florana.aggregate.carried import added
from florana.aggregate.mean import mean
from florana.lora.factors import Adapter, Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, sending, work
from florana.strategy.residuals import check_residual_rank, dtype_of, residual_note

FACTS = facts.Facts(
    does="adds the factor means' change to a frozen, factored residual; clients begin at principal vectors again",
    trains="A, B, begun anew in every round",
    up=facts.PAIR,
    down=facts.RESIDUAL,
    exact="as `fedit`: the cross-client covariance of A and B",
    base="moves, as a factored residual of rank k",
    secure_aggregation="yes: sums of A and of B",
    noise="in both factors: a product of noises, in the base for good",
    residual=lambda clients, rank, rounds: rank * (rounds + 1),
    differs="published unweighted, here weighted; the moved base is a frozen part beside it",
)
WORK = work(trains=["A", "B"], up=["A", "B"], down=[])


def build(residual_rank: int | None = None) -> Strategy:
    """The strategy.

    Args:
        residual_rank: the most components of the residual that are kept; all of them where not given.
    """
    check_residual_rank(residual_rank)
    made_of = facts.bounded(FACTS, residual_rank)
    return Strategy("frlora", "ICLR 2025", made_of, _init, sending(WORK), _Step(residual_rank), begin="principal")


def _init(adapter: Adapter) -> State:
    dtype = dtype_of(adapter)
    return State(0, adapter, added(None, None, None, dtype, less=adapter))


@dataclass(frozen=True)
class _Step:
    rank: int | None

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        averaged = mean(parts)
        dtype = dtype_of(state.adapter)
        residual = added(state.residual, averaged, self.rank, dtype, less=state.adapter)
        begun = Adapter(state.adapter.modules, averaged.extra)
        return Outcome(advance(state, begun, residual), residual_note(residual))
