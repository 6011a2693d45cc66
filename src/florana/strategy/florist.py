"""FLoRIST: as many singular terms as hold a share of the energy go out (Ramesh and Dasgupta, arXiv 2506.09199).

    sum_u w_u s_u B_u A_u = L S V^T;   p = the least k with sum_{i<=k} S_i^2 >= tau sum_i S_i^2

The leading r terms are what clients train on, the terms up to p a frozen part beside them, new in every round; where p
is below r, r terms go out, since zero columns could never be trained again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from florana.aggregate.terms import by_energy, divided
from florana.errors import RecipeError
from florana.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, ranks_of, start
from florana.strategy.ranks import best_and_rest
from florana.strategy.residuals import residual_note

FACTS = facts.Facts(
    does="sends as many terms of the true average as hold the share `energy` of it",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR_AND_RESIDUAL,
    exact="to the threshold",
    base="a frozen part beside the pair, new in every round",
    mixed_ranks="the best adapter of its own rank; the terms beyond it frozen beside it",
    noise="in both factors: a product of noises; the rest is post-processing",
    residual=lambda clients, rank, rounds: (clients * rounds - 1) * rank,
    coordinates="move",
    optimizer=("products",),
    aims_at_sum=True,
)


def build(energy: float = 0.99) -> Strategy:
    """The strategy.

    Args:
        energy: tau, the share of each module's squared norm that goes out; above 0, at most 1.
    """
    if not 0 < energy <= 1:
        raise RecipeError(f"strategy.energy is {energy}, not above 0 and at most 1")
    return Strategy("florist", "arXiv 2506.09199", FACTS, start, broadcast, _Step(energy), cut=best_and_rest)


@dataclass(frozen=True)
class _Step:
    energy: float

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        found = divided(parts, ranks_of(state.adapter), by_energy(self.energy), keep=0)
        return Outcome(advance(state, found.adapter, found.residual), residual_note(found.residual))
