"""Clients of heterogeneous ranks: each gets the part of the broadcast that its method gives to a client of its rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from florana.aggregate.factorization import revive
from florana.aggregate.heterogeneous import leading
from florana.aggregate.stack import concatenate
from florana.errors import RecipeError
from florana.lora import linalg
from florana.lora.factors import Adapter
from florana.strategy.base import Payload, State, Strategy
from florana.strategy.two_trips import told


def first_terms(payload: Payload, rank: int, scaling: float) -> Payload:
    """The first columns of B and rows of A."""
    return replace(payload, adapter=leading(payload.adapter, rank, scaling))


def best_terms(payload: Payload, rank: int, scaling: float) -> Payload:
    """The adapter of that rank and scaling nearest to the broadcast, balanced.

    Examples:
        >>> import torch
        >>> from florana.lora.factors import LoraFactors
        >>> pair = LoraFactors(torch.eye(3)[:, :2], torch.tensor([[1.0, 0.0], [0.0, 4.0]]), 1.0)
        >>> cut = best_terms(Payload(Adapter({"q": pair})), rank=1, scaling=2.0).adapter.modules["q"]
        >>> round(float((2.0 * cut.B @ cut.A)[1, 1]), 4)
        4.0
    """
    return replace(best_and_rest(payload, rank, scaling), residual=payload.residual)


def best_and_rest(payload: Payload, rank: int, scaling: float) -> Payload:
    """The nearest adapter of that rank; what it leaves out joins the frozen part, so that the client's model is whole.

    Before the first training B is zero, and the nearest adapter would be zero in both factors, which cannot be trained:
    then the client gets the first rows of A.
    """
    if not any(bool(pair.B.any()) for pair in payload.adapter.modules.values()):
        return first_terms(payload, rank, scaling)
    modules, frozen = {}, {}
    before = payload.residual.modules if payload.residual is not None else {}
    for name, pair in payload.adapter.modules.items():
        whole = linalg.decompose(linalg.stack([pair], [1.0]))
        own = min(rank, pair.rank)  # a broadcast may have fewer components than the client's rank
        modules[name] = linalg.balanced(linalg.kept(whole, own), scaling, pair.A.dtype)
        rest = [before[name]] if name in before else []
        if own < len(whole.values) and bool(whole.values[own] > 0):
            left = linalg.between(whole, own, len(whole.values))
            rest.append(linalg.balanced(left, 1.0, pair.A.dtype))
        if rest:
            frozen[name] = concatenate(rest, [1.0] * len(rest))
    adapter = revive(Adapter(modules, payload.adapter.extra), payload.adapter)
    return replace(payload, adapter=adapter, residual=Adapter(frozen) if frozen else None)


def with_ranks(strategy: Strategy, ranks: Mapping[str, int], scaling_of: Callable[[int], float]) -> Strategy:
    """The strategy, with every client sent an adapter of its own rank.

    Args:
        strategy: a method that can cut its broadcast to a lower rank.
        ranks: client -> rank, at most that of the server's adapter.
        scaling_of: rank -> scaling of a client of that rank.

    Raises:
        RecipeError: the method needs one rank; the reason is its own.
    """
    cut = strategy.cut
    if cut is None:
        raise RecipeError(
            f"model.client_ranks does not go with the strategy '{strategy.name}'", why=strategy.facts.mixed_ranks
        )

    def brief(state: State, client: str) -> Payload:
        whole = strategy.brief(state, client)
        own = cut(whole, ranks[client], scaling_of(ranks[client]))
        return own if strategy.sums is None else told(own, whole.adapter)

    return replace(strategy, brief=brief)
