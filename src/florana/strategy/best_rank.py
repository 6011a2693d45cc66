"""best-rank: the adapter of the clients' rank nearest to the true average of their updates (Eckart-Young).

Trains A and B; r (out + in) numbers up and down per module, as FedIT; the base stays; no adapter of that rank has a
smaller aggregation error. FlexLoRA (arXiv 2402.11505) gives the same product from a dense target; here it is never
dense. The server must see every client's factors.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.project import best_rank
from florana.factors import Adapter, Contribution
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, start


def build() -> Strategy:
    """The strategy; the rank is that of the adapter it starts from."""
    return Strategy("best-rank", "Eckart-Young 1936; arXiv 2402.11505", start, broadcast, _step)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, best_rank(parts, rank_of(state.adapter))))


def rank_of(adapter: Adapter) -> int:
    """The rank of the adapter's modules (the largest, where they differ)."""
    return max(pair.rank for pair in adapter.modules.values())
