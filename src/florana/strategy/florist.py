"""FLoRIST: as many singular components as hold a share of the energy go out (Ramesh and Dasgupta, arXiv 2506.09199).

    sum_u w_u s_u B_u A_u = L S V^T;   p = the least k with sum_{i<=k} S_i^2 >= tau sum_i S_i^2

p differs from module to module and from round to round. Where it is below r, p components go out, at least one, and
clients train factors of rank p and send them back: both ways cost p components. The rank grows again by itself,
as the sum of U such adapters has up to U p components; only where one client alone answered it could not, so then the
adapter keeps the rank that went out. Where p is above r, the leading r components are what clients train on, and the
components up to p a frozen part beside them, new in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from florana.aggregate.best_rank.truncate import by_energy, divided
from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, ranks_of
from florana.strategy.ranks import best_and_rest
from florana.strategy.residuals import residual_note

FACTS = facts.Facts(
    does="sends as many components of the true average as hold the share `energy` of it, fewer than r too",
    trains="A, B, of at most r components: as many as were sent",
    up=facts.PAIR,
    down=facts.PAIR_AND_RESIDUAL,
    exact="to the threshold",
    base="a frozen part beside the LoRA factors, new in every round",
    mixed_ranks="the best adapter of its own rank; the components beyond it frozen beside it",
    noise="in both factors: a product of noises; the rest is post-processing",
    residual=lambda clients, rank, rounds: (clients * rounds - 1) * rank,
    coordinates="move",
    optimizer=("products",),
    aims_at_sum=True,
    differs="components beyond r travel as a frozen part beside them; after a round of one client the rank stays",
)
_RANK = "rank/"
"""Before a module's name in the state's memory: r, which the factors themselves no longer show."""


def build(energy: float = 0.99) -> Strategy:
    """The strategy.

    Args:
        energy: tau, the share of each module's squared norm that goes out; above 0, at most 1.
    """
    if not 0 < energy <= 1:
        raise RecipeError(f"strategy.energy is {energy}, not above 0 and at most 1")
    return Strategy("florist", "arXiv 2506.09199", FACTS, _init, broadcast, _Step(energy), cut=best_and_rest)


def _init(adapter: Adapter) -> State:
    ranks = {_RANK + name: torch.tensor(rank) for name, rank in ranks_of(adapter).items()}
    return State(0, adapter, memory=ranks)


@dataclass(frozen=True)
class _Step:
    energy: float

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        sent = ranks_of(state.adapter)
        if len(parts) == 1:
            found = divided(parts, sent, by_energy(self.energy), keep=0)
        else:
            # Runs begun before components were left out: no ranks in their memory, r components in every adapter.
            most = {name: int(state.memory.get(_RANK + name, torch.tensor(rank))) for name, rank in sent.items()}
            found = divided(parts, most, by_energy(self.energy), keep=0, trained=_fewer)
        terms = ranks_of(found.adapter).values()
        notes = residual_note(found.residual) | {"trained_rank": [min(terms), max(terms)]}
        return Outcome(advance(state, found.adapter, found.residual), notes)


def _fewer(most: int, outgoing: int) -> int:
    return min(most, max(1, outgoing))
