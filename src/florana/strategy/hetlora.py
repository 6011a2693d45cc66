"""HetLoRA: padded factors weighted by the size of the updates, ranks that clients prune (Cho et al., arXiv 2401.06432).

    B = sum_u omega_u [B_u, 0],   A = sum_u omega_u [A_u; 0],   omega_u ~ w_u || s_u B_u A_u ||_F
    a client's loss:  l(B, A) + penalty * tail(B, A),   tail = sum over modules ||B[:, q:]||_F ||A[q:, :]||_F,
    q = floor(gamma r_u), at least 1;   r_u <- q  where local training made the tail smaller

Each client gets the first r_u columns and rows back; the server remembers r_u. Where no client of a round held a row of
A, the row stays as it was beside a zero column of B (`aggregate.factorization.alive`): the product is that of padding.

Self-pruning is off by default (`gamma = 1`), since its details are assumptions, written from the abstract and notes:
the tail as a product of norms, summed over modules without their scaling; one decision for all modules; the comparison
with the tail as it was sent, after the last step; a pruned client keeps its scaling s_u; no rank grows again. The
paper's value of the penalty was not at hand either. The first training starts at B = 0, of tail 0, and prunes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from florana.aggregate.heterogeneous import leading, norm_weighted_mean
from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution
from florana.strategy import facts
from florana.strategy.base import (
    Outcome,
    Payload,
    Pruning,
    State,
    Strategy,
    advance,
    rank_of,
    ranks_of,
    start,
)
from florana.strategy.ranks import first_terms

FACTS = facts.Facts(
    does="averages zero-padded A and B apart, larger updates counting more; clients may prune their rank (`gamma`)",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="inexact: the covariance of A and B, and a larger weight for larger updates",
    client_state="none: the server remembers each client's rank",
    mixed_ranks="the first r_u columns of B and rows of A",
    robust="all rules; a client's weight is the rule's, times the norm of its product",
    secure_aggregation="only if every client's norm is revealed",
    optimizer=("factors", "products"),
    differs="the norms are multiplied by the clients' weights (published: the norms alone; the same at equal weights); "
    "self-pruning, off by default, is written from notes",
)


def build(gamma: float = 1.0, penalty: float = 0.001) -> Strategy:
    """The strategy.

    Args:
        gamma: a client may prune its rank r to floor(gamma r), and to no less than 1; above 0, at most 1: no pruning.
        penalty: the weight of the tail in the clients' loss, at least 0; without meaning at gamma = 1.
    """
    if not 0 < gamma <= 1:
        raise RecipeError(f"strategy.gamma is {gamma}, not above 0 and at most 1")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise RecipeError(f"strategy.penalty is {penalty}, not a finite number of at least 0")
    method = _Pruned(gamma, penalty)
    return Strategy("hetlora", "arXiv 2401.06432", FACTS, start, method.brief, method.step, cut=method.cut)


@dataclass(frozen=True)
class _Pruned:
    gamma: float
    penalty: float

    def brief(self, state: State, client: str) -> Payload:
        """The broadcast, at the rank that the client has left."""
        left = state.memory.get(_entry(client))
        adapter = state.adapter if left is None else leading(state.adapter, int(left))
        return Payload(adapter, pruning=self._leave(adapter))

    def cut(self, payload: Payload, rank: int, scaling: float) -> Payload:
        """The same for a client whose rank in the recipe is lower; what it has pruned already stays pruned."""
        sent = first_terms(payload, rank, scaling)
        return replace(sent, pruning=self._leave(sent.adapter))

    def step(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        after = advance(state, norm_weighted_mean(parts, ranks_of(state.adapter)))
        if self.gamma == 1:
            return Outcome(after)
        ranks = [rank_of(part.adapter) for part in parts]
        own: dict[str, Tensor] = {_entry(p.client): torch.tensor(rank) for p, rank in zip(parts, ranks, strict=True)}
        notes = {"clients": [part.client for part in parts], "ranks": ranks}
        return Outcome(replace(after, memory={**state.memory, **own}), notes)

    def _leave(self, adapter: Adapter) -> Pruning | None:
        rank = rank_of(adapter)
        lower = max(1, math.floor(self.gamma * rank + 1e-9))  # 0.29 * 100 is a little below 29
        return Pruning(lower, self.penalty) if lower < rank else None


def _entry(client: str) -> str:
    return f"rank/{client}"
