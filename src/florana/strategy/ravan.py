"""RAVAN: several small matrices between fixed orthogonal factors (Raje et al., arXiv 2506.05568, NeurIPS 2025).

    update_u = s sum_k s_uk B_k H_uk A_k;   H_k <- sum_u w_u s_uk H_uk,  the scales s_uk back to 1

h blocks (heads) of size m between random factors whose spans are orthogonal to one another, with a trained scale each;
the scale is multiplied in before sending. h m^2 parameters up and down.

A client of small means trains and sends c of the heads, and gets all of them: the others act frozen in its model. A
head is averaged over the clients that trained it, T_k, and stays as it was where nobody did:

    H_k <- sum_{u in T_k} w_u s_uk H_uk / sum_{u in T_k} w_u

so the step is the mean of the clients' whole models only where all train all heads; the aggregation error says how far
it is otherwise. Written from the abstract and notes: which heads a client takes is drawn anew in every round,
uniformly, from the recipe's seed, the round and the client's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from florana.aggregate.cores import mean_cores
from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy import facts
from florana.strategy.base import Outcome, Payload, State, Strategy, advance, work
from florana.strategy.random_factors import choice, generator_of, orthonormal_columns

FACTS = facts.Facts(
    does="averages h small matrices between fixed orthogonal factors, scales multiplied in",
    trains="H_k, (r/h) x (r/h), and a scale for each of the h heads",
    up=facts.CORE,
    down=facts.CORE,
    exact="exact; where clients train some heads, of each head over those who trained it",
    client_state="none: the fixed factors come from the recipe's seed",
    mixed_ranks="all share the fixed factors; a client of rank r_u trains and sends r_u / m of the heads, at least one",
    trained=lambda s: facts.CORE.of(s) + s.blocks,  # the scales
    secure_aggregation="yes: sums of s H",
    noise="in s H alone: linear",
    optimizer=("factors",),
    differs="written from the abstract and notes: which heads a client takes is drawn anew in every round",
)
WORK = work(trains=["core", "scale"], up=["core"], down=["core"])
_SEED = "seed"
"""Where the state keeps the seed of the choice of heads."""


def build(heads: int = 4, size: int = 16, heads_per_client: int | None = None) -> Strategy:
    """The strategy.

    Args:
        heads: h, how many small matrices per module.
        size: rows and columns of each; r = heads * size, which must not be above the smaller side of any adapted
            module. `heads` and `size` take the place of the recipe's rank.
        heads_per_client: c, how many of them each client trains and sends in a round; all of them where not given. For
            clients of different means give `model.client_ranks` (and a `model.rank` not below them): rank r_u is worth
            r_u / size heads, rounded down, at least one, and no more than c.
    """
    for name, value in (("heads", heads), ("size", size), ("heads_per_client", heads_per_client)):
        if value is not None and value < 1:
            raise RecipeError(f"strategy.{name} is {value}, not at least 1")
    count = heads if heads_per_client is None else heads_per_client
    if count > heads:
        raise RecipeError(f"strategy.heads_per_client is {count}, but there are {heads} heads")

    def brief(state: State, client: str) -> Payload:
        seed = state.memory.get(_SEED)  # absent in a state that another method began
        order = choice(0 if seed is None else int(seed), state.round + 1, client, heads)
        return Payload(state.adapter, None, WORK, blocks=order[:count])

    def cut(payload: Payload, rank: int, scaling: float) -> Payload:
        del scaling  # that of the fixed factors is everybody's
        return replace(payload, blocks=(payload.blocks or ())[: max(1, rank // size)])

    facts_of = replace(FACTS, shape=lambda rank: (heads * size, heads))
    if count < heads:
        some = facts.Count("c (r/h)^2", lambda s: count * (s.rank // s.blocks) ** 2)
        facts_of = replace(
            facts_of,
            secure_aggregation="no: of heads that some clients train, each has weights of its own",
            robust="no: clients that train different heads cannot be compared",
            up=some,
            trained=lambda s: some.of(s) + count,
        )
    return Strategy("ravan", "arXiv 2506.05568", facts_of, _init(heads, size), brief, _step, cut=cut)


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
        seed = torch.randint(2**62, (), generator=generator)
        return State(0, Adapter(modules, adapter.extra, cores), memory={_SEED: seed})

    return init


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, mean_cores(parts)))
