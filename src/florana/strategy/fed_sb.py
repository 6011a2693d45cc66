"""Fed-SB: a small matrix trained between fixed factors, averaged exactly (Singhal et al., arXiv 2502.15436).

    update_u = s B R_u A,   B (out x r) and A (r x in) fixed with orthonormal columns and rows;   R = sum_u w_u R_u

r^2 parameters up and down. The fixed factors come from the first gradient G, as published (`begin = gradient`; pooled
over clients, which only a simulation can do), from the base weights' singular vectors (`principal`, the default: no
data needed), or are random (`random`). Give it a large rank: r = 200 costs what rank 5 of LoRA costs on 4096 x 4096.

    begin = gradient:   L S V^T = -eta sign(G),   B = L_r,   A = V_r^T,   s R_0 = diag(S_1, ..., S_r)

so training begins one step of the clients' learning rate eta in, as published; from the other two starts R_0 = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from florana.aggregate.cores import mean_cores
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, sending, work
from florana.strategy.random_factors import generator_of, orthonormal_columns, orthonormal_rows

FACTS = facts.Facts(
    does="averages the r x r matrices between fixed factors",
    trains="R, r x r",
    up=facts.CORE,
    down=facts.CORE,
    exact="exact",
    client_state="none: the fixed factors come from the recipe's seed and the base weights",
    mixed_ranks="refused: all clients share the fixed factors",
    trained=facts.CORE.of,
    secure_aggregation="yes: sums of R",
    noise="in R alone: linear, in the fewest dimensions; a first gradient must be accounted for",
    optimizer=("factors",),
    differs="published unweighted, here weighted; published with `begin = gradient`, which pools gradients "
    "and is no default here",
)
WORK = work(trains=["core"], up=["core"], down=["core"])


def build(begin: Literal["principal", "gradient", "random"] = "principal") -> Strategy:
    """The strategy.

    Args:
        begin: where the fixed factors come from.
    """
    if begin == "random":
        return Strategy("fed-sb", "arXiv 2502.15436", FACTS, _random, sending(WORK), _step)
    init = _one_step_in if begin == "gradient" else _spanned
    return Strategy("fed-sb", "arXiv 2502.15436", FACTS, init, sending(WORK), _step, begin=begin)


def _spanned(adapter: Adapter) -> State:
    """Orthonormal factors of the same spans as the adapter's."""

    def spanned(pair: LoraFactors) -> LoraFactors:
        return LoraFactors(orthonormal_rows(pair.B.T).T.contiguous(), orthonormal_rows(pair.A), pair.scaling)

    return _fixed(adapter, spanned)


def _one_step_in(adapter: Adapter) -> State:
    """The same factors, and between them the R_0 with the adapter's own product: B^T (B_pair A_pair) A^T."""
    fixed = _spanned(adapter).adapter
    cores = {}
    for name, pair in adapter.modules.items():
        own = fixed.modules[name]
        left, right = own.B.double().T @ pair.B.double(), pair.A.double() @ own.A.double().T
        cores[name] = (left @ right)[None].to(pair.A.dtype)
    return State(0, Adapter(fixed.modules, fixed.extra, cores))


def _random(adapter: Adapter) -> State:
    generator = generator_of(adapter, "fed-sb")

    def drawn(pair: LoraFactors) -> LoraFactors:
        (out, into), what = pair.shape, "fed-sb"
        B = orthonormal_columns(out, pair.rank, generator, what).to(pair.B.dtype)
        A = orthonormal_columns(into, pair.rank, generator, what).T.to(pair.A.dtype)
        return LoraFactors(B=B, A=A, scaling=pair.scaling)

    return _fixed(adapter, drawn)


def _fixed(adapter: Adapter, factors: Callable[[LoraFactors], LoraFactors]) -> State:
    modules = {name: factors(pair) for name, pair in adapter.modules.items()}
    cores = {name: torch.zeros((1, pair.rank, pair.rank), dtype=pair.A.dtype) for name, pair in modules.items()}
    return State(0, Adapter(modules, adapter.extra, cores))


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, mean_cores(parts)))
