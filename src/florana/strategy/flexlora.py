"""FlexLoRA: the true average, decomposed; every client gets its own number of components (Bai et al., arXiv
2402.11505).

    sum_u w_u s_u B_u A_u = L S V^T;    client u gets  B = L_r S_r / s_u,  A = V_r^T,  r = r_u

The paper forms the dense sum and its whole decomposition; here neither is. It gives the product of `best-rank`, with
orthonormal rows of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from florana.aggregate.best_rank.project import best_rank
from florana.aggregate.factorization import orthonormal
from florana.lora.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, Payload, State, Strategy, advance, broadcast, ranks_of, start
from florana.strategy.ranks import best_terms

FACTS = facts.Facts(
    does="decomposes the true average; each client gets the leading singular components of its own rank",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="the optimum of rank r",
    mixed_ranks="the best adapter of its own rank",
    noise="in both factors: a product of noises; the rest is post-processing",
    coordinates="move",
    optimizer=("products",),
    aims_at_sum=True,
)


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("flexlora", "arXiv 2402.11505", FACTS, start, broadcast, _step, cut=_cut)


def _cut(payload: Payload, rank: int, scaling: float) -> Payload:
    best = best_terms(payload, rank, scaling)
    return replace(best, adapter=orthonormal(best.adapter, best.adapter))


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, orthonormal(best_rank(parts, ranks_of(state.adapter)), state.adapter)))
