"""FedSVD: B trained and averaged, then B A turned by its SVD into a new A (Lee et al., arXiv 2505.12805, NeurIPS 2025).

    B_avg = sum_u w_u B_u;   B_avg A = L S V^T (rank r);   A <- V^T,  B <- L S

Exact, since A is the same for all clients; A has orthonormal rows, also at the start. B goes up, the new factors down.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.factorization import orthonormal
from florana.aggregate.shared_factor import mean_of_B
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, sending, work
from florana.strategy.random_factors import orthonormal_rows

FACTS = facts.Facts(
    does="averages B, then makes the right singular vectors of B A the next A",
    trains="B",
    up=facts.ONLY_B,
    down=facts.PAIR,
    exact="exact",
    mixed_ranks="refused: all clients train B against one A",
    secure_aggregation="yes: sums of B",
    trained=facts.ONLY_B.of,
    noise="in B alone: linear; the decomposition is post-processing",
    coordinates="move",
    differs="A has orthonormal rows in the first round too; the official code begins at PEFT's A, of rows of norm 0.57",
)
WORK = work(trains=["B"], up=["B"], down=["A", "B"])


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("fedsvd", "arXiv 2505.12805", FACTS, _init, sending(WORK), _step)


def _init(adapter: Adapter) -> State:
    """The same B, and A with the orthonormal rows that span what its rows span."""
    modules = {
        name: LoraFactors(B=pair.B, A=orthonormal_rows(pair.A), scaling=pair.scaling)
        for name, pair in adapter.modules.items()
    }
    return State(0, Adapter(modules, adapter.extra))


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    averaged = mean_of_B(parts, shared=state.adapter)
    return Outcome(advance(state, orthonormal(averaged, state.adapter)))
