"""FLoRA: the clients' updates stacked, exact, into the base; fresh factors every round (Wang et al., arXiv 2409.05976).

    A = [w_1 A_1; ...; w_U A_U],  B = [B_1 ... B_U],  W <- W + s B A,  then a new random A and B = 0

A new A has the spread (standard deviation) of the first one, module by module, which the state keeps.

The stacks of all rounds are kept as one frozen residual of as few components as it takes, complete in every broadcast:
the paper sends each round's stack, of rank sum r_u, to everybody for ever. `residual_rank` bounds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from florana.aggregate.best_rank.project import targets
from florana.aggregate.carried import recompressed
from florana.aggregate.validate import average_extra
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, sending, work
from florana.strategy.random_factors import generator_of, like
from florana.strategy.ranks import first_terms
from florana.strategy.residuals import check_residual_rank, dtype_of, residual_note

FACTS = facts.Facts(
    does="adds the exact sum to a frozen, factored residual; clients begin with fresh factors",
    trains="A, B, new in every round",
    up=facts.PAIR,
    down=facts.A_AND_RESIDUAL,
    exact="exact, or the residual's tail where its rank is bounded",
    base="moves, as a factored residual of rank k",
    mixed_ranks="the first rows of the fresh A",
    noise="in both factors, and in the base for good",
    residual=lambda clients, rank, rounds: clients * rank * rounds,
    coordinates="move",
    optimizer=("products",),
    aims_at_sum=True,
    differs="not each round's stack travels but the sum of all: one frozen residual of as few components as it takes",
)
_SPREAD = "spread/"
WORK = work(trains=["A", "B"], up=["A", "B"], down=["A"])


def build(residual_rank: int | None = None) -> Strategy:
    """The strategy.

    Args:
        residual_rank: the most components of the residual that are kept; all of them where not given.
    """
    check_residual_rank(residual_rank)
    made_of = facts.bounded(FACTS, residual_rank)
    return Strategy("flora", "arXiv 2409.05976", made_of, _init, sending(WORK), _Step(residual_rank), cut=first_terms)


def _init(adapter: Adapter) -> State:
    return State(0, adapter, memory=_spreads(adapter))


def _spreads(adapter: Adapter) -> dict[str, Tensor]:
    return {_SPREAD + name: pair.A.double().std() for name, pair in adapter.modules.items()}


@dataclass(frozen=True)
class _Step:
    rank: int | None

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        sums = targets(parts)
        dtype = dtype_of(state.adapter)
        residual = recompressed({name: whole for name, (whole, _, _) in sums.items()}, self.rank, dtype)
        generator = generator_of(state.adapter, "flora")
        # A state of before the spread was kept, or that another method began, has the last A's: it wanders no further.
        spreads = _spreads(state.adapter) | dict(state.memory)
        fresh = {
            name: LoraFactors(
                B=torch.zeros_like(pair.B),
                A=like(pair.A, float(spreads[_SPREAD + name]), generator),
                scaling=pair.scaling,
            )
            for name, pair in state.adapter.modules.items()
        }
        after = advance(state, Adapter(fresh, average_extra(parts)), residual)
        return Outcome(replace(after, memory=spreads), residual_note(residual))
