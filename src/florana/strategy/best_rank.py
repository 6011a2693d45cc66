"""best-rank: the adapter of the clients' rank nearest to the true average of their updates (Eckart-Young).

Trains A and B; r (out + in) parameters up and down per module, as FedIT; the base stays; no adapter of that rank has a
smaller aggregation error. FlexLoRA (arXiv 2402.11505) gives the same product from a dense target; here it is never
dense. Beyond the published methods, each an option:

    factorization  which of the equivalent pairs goes back (see aggregate/factorization.py)
    carry_rank     what rank r could not carry is kept at the server, in at most so many terms, for the next target
    broadcast_*    the terms after the first r go out too, as a frozen part beside the pair: so many, or as many as an
                   error asks for, or as a budget allows
    source         `sums`: near the same adapter from two sums over the clients (`aggregate/best_rank/sketch.py`); the
                   server needs no single client's factors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from florana.aggregate.best_rank.project import best_rank
from florana.aggregate.best_rank.truncate import Choose, by_budget, by_error, by_rank, divided
from florana.aggregate.factorization import Factorization, aligned, balanced, orthonormal
from florana.aggregate.validate import Rank
from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution, adapter_from_tensors
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, ranks_of, start
from florana.strategy.ranks import best_and_rest, best_terms
from florana.strategy.residuals import residual_note
from florana.strategy.two_trips import columns_of, near_A, two_trips

FACTS = facts.Facts(
    does="the nearest adapter of rank r; options `factorization`, `carry_rank`, `broadcast_rank`, "
    "`broadcast_error`, `broadcast_bytes`, `source`, `sketch`",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="the optimum of rank r (Eckart-Young)",
    mixed_ranks="the best adapter of its own rank",
    noise="in both factors: a product of noises; the rest is post-processing",
    coordinates="move",
    optimizer=("products",),
    aims_at_sum=True,
)
WIDE = replace(
    FACTS,
    down=facts.PAIR_AND_RESIDUAL,
    exact="the optimum of rank r + k",
    base="a frozen part beside the LoRA factors, new in every round",
    mixed_ranks="the best adapter of its own rank; the components beyond it frozen beside it",
    residual=lambda clients, rank, rounds: (clients * rounds - 1) * rank,
)
FACTORIZATIONS: dict[str, Factorization] = {"balanced": balanced, "orthonormal": orthonormal, "aligned": aligned}
_MEMORY = "kept/"


def build(
    factorization: Literal["balanced", "orthonormal", "aligned"] = "balanced",
    carry_rank: int = 0,
    broadcast_rank: int | None = None,
    broadcast_error: float | None = None,
    broadcast_bytes: int | None = None,
    source: Literal["factors", "sums"] = "factors",
    sketch: int | None = None,
) -> Strategy:
    """The strategy; the clients' rank is that of the adapter it starts from.

    Args:
        factorization: balanced factors, orthonormal rows of A, or balanced and turned to the last broadcast.
        carry_rank: the most terms per module that are kept for the next round.
        broadcast_rank: r + k, how many terms of every module go out.
        broadcast_error: the relative error per module at which the terms that go out are enough.
        broadcast_bytes: float32 bytes of a whole broadcast, spent where they take away most error.
        source: what the server has: every client's factors, or two sums of sketches of their products.
        sketch: k, the columns of those sketches; None: 2 r.

    Raises:
        RecipeError: options that exclude one another, or a number that makes no sense.
    """
    wide = _chooser(broadcast_rank, broadcast_error, broadcast_bytes)
    if carry_rank < 0:
        raise RecipeError(f"strategy.carry_rank is {carry_rank}, not at least 0")
    step = _Step(FACTORIZATIONS[factorization], carry_rank, wide)
    if source == "sums":
        return _from_sums(step, sketch)
    if sketch is not None:
        raise RecipeError("strategy.sketch is of strategy.source = 'sums'", fix="set the source, or leave it out")
    made_of, cut = (FACTS, best_terms) if wide is None else (_widened(broadcast_rank), best_and_rest)
    return Strategy("best-rank", "Eckart-Young 1936; arXiv 2402.11505", made_of, start, broadcast, step, cut=cut)


def _widened(terms: int | None) -> facts.Facts:
    """What a broadcast of so many terms is; None: of as many as an error or a budget allows."""
    if terms is None:
        return WIDE
    return replace(WIDE, residual=lambda clients, rank, rounds: max(0, min(terms, clients * rounds * rank) - rank))


def _from_sums(step: _Step, sketch: int | None) -> Strategy:
    if step.wide is not None:
        raise RecipeError(
            "strategy.broadcast_rank, broadcast_error and broadcast_bytes do not go with strategy.source = 'sums'",
            why="clients of lower ranks would carry different frozen parts, which the sums do not tell apart",
            fix="leave it out, or set strategy.source = 'factors'",
        )
    k, columns = columns_of(sketch, 2)
    made_of = replace(
        FACTS,
        up=facts.sketched(k, columns),
        down=facts.and_range(k, columns),
        exact="near the optimum of rank r: within 1 % on six clients of a real Llama, 10 % in a rough first round",
        absent="nothing; one that answers the first trip alone is missing from the second sum",
        secure_aggregation="yes: two sums, of sketches",
        robust="no: its server sees sums of sketches, not updates",
    )
    source, sums = "Halko, Martinsson and Tropp 2011", two_trips(columns, near_A)
    return Strategy("best-rank", source, made_of, start, broadcast, step, cut=best_terms, sums=sums)


def _chooser(rank: int | None, error: float | None, budget: int | None) -> Callable[[Rank], Choose] | None:
    """The clients' rank -> how many components go out; None where only that many do."""
    given = {"broadcast_rank": rank, "broadcast_error": error, "broadcast_bytes": budget}
    named = [f"strategy.{name}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise RecipeError(f"{' and '.join(named)} exclude one another", fix="give one of them")
    if rank is not None:
        if rank < 1:
            raise RecipeError(f"strategy.broadcast_rank is {rank}, not at least 1")
        return lambda own: by_rank(rank)
    if error is not None:
        if not 0 <= error < 1:
            raise RecipeError(f"strategy.broadcast_error is {error}, not at least 0 and below 1")
        return lambda own: by_error(error)
    if budget is not None:
        if budget < 1:
            raise RecipeError(f"strategy.broadcast_bytes is {budget}, not at least 1")
        return lambda own: by_budget(budget // 4, own)
    return None


@dataclass(frozen=True)
class _Step:
    factorization: Factorization
    carry_rank: int
    wide: Callable[[Rank], Choose] | None

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        rank = ranks_of(state.adapter)
        if self.wide is None and self.carry_rank == 0:
            return Outcome(advance(state, self.factorization(best_rank(parts, rank), state.adapter)))
        choose = self.wide(rank) if self.wide is not None else by_rank(rank)
        found = divided(parts, rank, choose, added=_kept(state.memory), keep=self.carry_rank)
        adapter = self.factorization(found.adapter, state.adapter)
        notes = residual_note(found.residual) if self.wide is not None else {}
        next_state = advance(state, adapter, found.residual)
        if self.carry_rank:
            notes["memory_norm"] = _norm(found.rest)
            next_state = replace(next_state, memory=_stored(found.rest))
        return Outcome(next_state, notes)


def _stored(rest: Adapter | None) -> dict[str, Tensor]:
    return {_MEMORY + name: tensor for name, tensor in rest.tensors().items()} if rest is not None else {}


def _kept(memory: Mapping[str, Tensor]) -> Adapter | None:
    tensors = {name.removeprefix(_MEMORY): t for name, t in memory.items() if name.startswith(_MEMORY)}
    if not tensors:
        return None
    return adapter_from_tensors(tensors, {name.partition("/")[2]: 1.0 for name in tensors})


def _norm(rest: Adapter | None) -> float:
    """Of balanced factors of a singular value decomposition: the squares of their columns are the singular values."""
    if rest is None:
        return 0.0
    return float(sum(float(pair.B.double().square().sum(0).square().sum()) for pair in rest.modules.values()) ** 0.5)
