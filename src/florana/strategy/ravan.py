"""RAVAN: several small matrices between fixed orthogonal factors (Raje et al., arXiv 2506.05568, NeurIPS 2025).

    update_u = s sum_k s_uk B_k H_uk A_k;   H_k <- sum_u w_u s_uk H_uk,  the scales s_uk back to 1

h blocks of size m between random factors whose spans are orthogonal to one another, with a trained scale each; the
scale is multiplied in before sending. h m^2 numbers up and down. The paper's choice of some heads per client is not
part of this: every client trains all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from florana.aggregate.core import mean_cores
from florana.errors import RecipeError
from florana.factors import Adapter, Contribution, LoraFactors
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, sending, work
from florana.strategy.draws import generator_of, orthonormal_columns

FACTS = facts.Facts(
    does="averages h small matrices between fixed orthogonal factors, scales multiplied in",
    trains="H_k, (r/h) x (r/h), and a scale for each of the h heads",
    up=facts.CORE,
    down=facts.CORE,
    exact="exact",
    client_state="none: the fixed factors come from the recipe's seed",
    mixed_ranks="refused: all clients share the fixed factors",
    trained=facts.CORE.of,
    secure_aggregation="yes: sums of s H",
    noise="in s H alone: linear",
)
WORK = work(trains=["core", "scale"], up=["core"], down=["core"])


def build(heads: int = 4, size: int = 16) -> Strategy:
    """The strategy.

    Args:
        heads: h, how many small matrices per module. size: rows and columns of each; r = heads * size, which must not
            be above the smaller side of any adapted module. Both take the place of the recipe's rank.
    """
    for name, value in (("heads", heads), ("size", size)):
        if value < 1:
            raise RecipeError(f"strategy.{name} is {value}, not at least 1")
    facts_of = replace(FACTS, shape=lambda rank: (heads * size, heads))
    return Strategy("ravan", "arXiv 2506.05568", facts_of, _init(heads, size), sending(WORK), _step)


def _init(heads: int, size: int) -> Callable[[Adapter], State]:
    def init(adapter: Adapter) -> State:
        generator = generator_of(adapter, "ravan")
        modules: dict[str, LoraFactors] = {}
        for name, pair in adapter.modules.items():
            (out, into), what = pair.shape, f"ravan with {heads} heads of {size}, module '{name}'"
            B = orthonormal_columns(out, heads * size, generator, what).to(pair.B.dtype)
            A = orthonormal_columns(into, heads * size, generator, what).T.contiguous().to(pair.A.dtype)
            modules[name] = LoraFactors(B=B, A=A, scaling=pair.scaling)
        cores = {name: torch.zeros((heads, size, size), dtype=pair.A.dtype) for name, pair in modules.items()}
        return State(0, Adapter(modules, adapter.extra, cores))

    return init


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, mean_cores(parts)))
