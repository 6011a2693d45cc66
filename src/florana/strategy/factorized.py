"""Which of the equivalent factors go back, for any strategy that returns LoRA factors: the same product, another start.

    as-averaged   what the rule gives               balanced, orthonormal, aligned   see `aggregate.factorization`

So a method's product and the factors it comes in can be told apart: FedIT's own product in balanced factors is another
start for the clients than FedIT's means, at r x r cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from florana.aggregate import factorization as equivalent
from florana.errors import RecipeError
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution
from florana.strategy.base import Outcome, State, Strategy
from florana.strategy.ranks import best_terms
from florana.strategy.server_optimizer import OnFactors

Factorization = Literal["as-averaged", "balanced", "orthonormal", "aligned"]

_WAYS = {"balanced": equivalent.balanced, "orthonormal": equivalent.orthonormal, "aligned": equivalent.aligned}


def with_factorization(strategy: Strategy, factorization: Factorization) -> Strategy:
    """The strategy, its factors given back in that factorization; the product is the same to rounding.

    Raises:
        RecipeError: the clients need the factors as they are (one of them is fixed, or begun anew in every round).
    """
    if factorization == "as-averaged":
        return strategy
    if isinstance(strategy.step, OnFactors):
        raise RecipeError(
            f"server.factorization = '{factorization}' does not go with a server optimizer on the factors",
            why="its moments belong to the factors as they were averaged",
            fix="set server.space = 'products', or server.factorization = 'as-averaged'",
        )
    facts = strategy.facts
    if not (facts.one_model and facts.trains == "A, B"):
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with server.factorization = '{factorization}'",
            why="its clients need the factors as the step leaves them, or there is no global product",
            fix="set server.factorization = 'as-averaged', or choose another strategy",
        )
    cut = best_terms if strategy.cut is not None and facts.base == "stays" else strategy.cut
    step = _Step(strategy, _WAYS[factorization])
    return replace(strategy, facts=replace(facts, coordinates="move"), step=step, cut=cut)


@dataclass(frozen=True)
class _Step:
    strategy: Strategy
    factorize: equivalent.Factorization

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        outcome = self.strategy.step(state, parts)
        given = outcome.state.adapter
        modules = {}
        for name, pair in given.modules.items():
            whole = linalg.kept(linalg.decompose(linalg.stack([pair], [1.0])), pair.rank)
            modules[name] = linalg.balanced(whole, pair.scaling, pair.A.dtype)
        turned = self.factorize(Adapter(modules, given.extra), state.adapter)
        return replace(outcome, state=replace(outcome.state, adapter=equivalent.revive(turned, state.adapter)))
