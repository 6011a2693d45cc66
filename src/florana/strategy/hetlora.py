"""HetLoRA: factors padded with zeros to one rank, weighted by the size of the updates (Cho et al., arXiv 2401.06432).

    B = sum_u omega_u [B_u, 0],   A = sum_u omega_u [A_u; 0],   omega_u ~ w_u || s_u B_u A_u ||_F

Each client gets the first r_u columns and rows back. The paper's self-pruning of ranks, a term in the clients' loss,
is not part of this: a client's rank is what the recipe gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.pad import norm_weighted_mean
from florana.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, ranks_of, start
from florana.strategy.ranks import first_terms

FACTS = facts.Facts(
    does="averages zero-padded A and B apart, larger updates counting more",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="no: the covariance of the factors, and a larger weight for larger updates",
    mixed_ranks="the first r_u columns of B and rows of A",
    secure_aggregation="only if every client's norm is revealed",
)


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("hetlora", "arXiv 2401.06432", FACTS, start, broadcast, _step, cut=first_terms)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, norm_weighted_mean(parts, ranks_of(state.adapter))))
