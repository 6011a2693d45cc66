"""A server optimizer around any strategy with a global product: what to do with the average once it is known.

The round's displacement d_t is taken for a negated gradient (FedOpt; Reddi et al., arXiv 2003.00295). On **products**,
where FedAvgM and its kin have so far been used on the factors:

    momentum      v_t = beta v_{t-1} + d_t,    target = W_t + eta v_t
    nesterov      v_t as above,                target = W_t + eta (d_t + beta v_t)
    extrapolate   target = W_t + eta eta_t d_t          (FedExP, arXiv 2301.09604)

and the strategy's own rule approximates the target: what is to be added to the clients' mean is handed to it as a
frozen part that all clients carried, which belongs to the sum. A rule that answers with the factors alone (FedIT,
FLoRA-NA) has the optimizer after it: its product is moved, and the best rank r of the result goes back. On **factors**
(what averages A, B or a core entry by entry) the same formulas, and Adam, work on the tensors: FedAvgM and FedAdam.
Products have no Adam: it divides by the root of an entry's own second moment, and a dense matrix of entries is what
never exists here. Heads follow the same formula, on the tensors, in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from florana.aggregate import displacement as moving
from florana.errors import RecipeError
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution, LoraFactors, adapter_from_tensors, kind_of
from florana.strategy.base import Outcome, State, Strategy, advance
from florana.strategy.moments import ServerStep, stepped
from florana.strategy.ranks import best_terms
from florana.strategy.residuals import dtype_of

Space = Literal["products", "factors"]

_MEMORY = "server/"


def spaces(strategy: Strategy) -> list[Space]:
    """Where a server optimizer can work with this strategy, its own place first; empty where it has no global product
    that continues from round to round."""
    return list(strategy.facts.optimizer)


def with_optimizer(strategy: Strategy, settings: ServerStep, space: Space | None) -> Strategy:
    """The strategy with a server optimizer.

    Args:
        strategy: any; `none` gives it back as it is.
        settings: the formula and its numbers.
        space: `products` or `factors`; None takes the strategy's own.

    Raises:
        RecipeError: the strategy has no global product to move, or not in that space; Adam on products.
    """
    if settings.optimizer == "none":
        return strategy
    possible = spaces(strategy)
    if not possible:
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with server.optimizer = '{settings.optimizer}'",
            why="it has no global product, or its clients need the factors as the step leaves them",
            fix="set server.optimizer = 'none', or choose another strategy",
        )
    chosen = space or ("factors" if settings.optimizer == "adam" and "factors" in possible else possible[0])
    if chosen not in possible:
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with server.space = '{chosen}'",
            fix=f"it goes with {' and '.join(possible)}",
        )
    if chosen == "products" and settings.optimizer == "adam":
        raise RecipeError(
            "server.optimizer = 'adam' does not go with server.space = 'products'",
            why="Adam needs every entry's second moment, and products are never formed entry by entry",
            fix="set server.space = 'factors' with a strategy that averages factors (fedit), or use 'momentum'",
        )
    if chosen == "factors":
        return replace(strategy, step=OnFactors(strategy, settings))
    facts = replace(strategy.facts, coordinates="move")
    if strategy.facts.aims_at_sum:
        return replace(strategy, facts=facts, step=_BeforeRule(strategy, settings))
    cut = best_terms if strategy.cut is not None else None  # balanced factors go back, whatever the rule's own was
    return replace(strategy, facts=facts, step=_AfterRule(strategy, settings), cut=cut)


@dataclass(frozen=True)
class _BeforeRule:
    """The rule approximates the moved target: mean + r, where r = eta u - d is handed on as a part carried frozen."""

    strategy: Strategy
    settings: ServerStep

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        inner, own = _split(state)
        before = moving.products(inner.adapter, inner.residual)
        moved = moving.displacement(moving.average(parts), before)
        ahead = _direction(self.settings, moved, own, parts, inner)
        aimed = _carrying(parts, moving.shortened(ahead.change, None, dtype_of(inner.adapter)).adapter)
        outcome = self.strategy.step(inner, aimed)
        return _finished(outcome, self.settings, state, ahead, judged=(aimed, outcome.state))


@dataclass(frozen=True)
class _AfterRule:
    """The rule's own product is moved, and the best factors of the broadcast's rank take its place."""

    strategy: Strategy
    settings: ServerStep

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        inner, own = _split(state)
        outcome = self.strategy.step(inner, parts)
        answer = outcome.state
        before = moving.products(inner.adapter, inner.residual)
        moved = moving.displacement(moving.products(answer.adapter, answer.residual), before)
        ahead = _direction(self.settings, moved, own, parts, inner)
        target = moving.combined(moving.products(answer.adapter, None), 1.0, ahead.change, 1.0)
        modules = {}
        for name, pair in answer.adapter.modules.items():
            whole = linalg.decompose(target[name])
            modules[name] = linalg.balanced(linalg.kept(whole, pair.rank), pair.scaling, pair.A.dtype)
        after = advance(inner, Adapter(modules, answer.adapter.extra), answer.residual)
        judged = (_carrying(parts, moving.shortened(ahead.change, None, dtype_of(inner.adapter)).adapter), after)
        finished = Outcome(replace(after, memory=answer.memory), outcome.notes)
        return _finished(finished, self.settings, state, ahead, judged=judged)


@dataclass(frozen=True)
class OnFactors:
    """The tensors that the rule averaged are moved: FedAvgM, FedAdam. The error figures stay those of the rule."""

    strategy: Strategy
    settings: ServerStep

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        inner, own = _split(state)
        outcome = self.strategy.step(inner, parts)
        answer, last = outcome.state, inner.adapter.tensors()
        trained = self.strategy.brief(inner, parts[0].client).work.up | {"extra"}
        chosen = {n: t for n, t in answer.adapter.tensors().items() if kind_of(n) in trained and n in last}
        eta = self.settings.learning_rate
        notes: dict[str, object] = {}
        if self.settings.optimizer == "extrapolate":
            length = moving.extrapolation(parts, inner.adapter, inner.residual)
            notes["extrapolation"] = length
            eta *= length
        moved, kept = stepped({n: last[n] for n in chosen}, chosen, own, self.settings, eta)
        adapter = adapter_from_tensors({**answer.adapter.tensors(), **moved}, answer.adapter.scalings)
        memory = {**answer.memory, **{_MEMORY + name: t for name, t in {**own, **kept}.items()}}
        after = replace(answer, adapter=adapter, memory=memory)
        return Outcome(after, {**outcome.notes, **notes}, judged=outcome.judged or (parts, answer))


@dataclass(frozen=True, eq=False)
class _Ahead:
    """change: what is added to the mean (or to the rule's product). velocity: what is kept; None where nothing is.

    eta: the step's length, heads included. notes: of the step.
    """

    change: moving.Stacks
    velocity: Adapter | None
    eta: float
    notes: Mapping[str, object]


def _direction(
    settings: ServerStep, moved: moving.Stacks, own: Mapping[str, Tensor], parts: Sequence[Contribution], state: State
) -> _Ahead:
    """From d_t and the kept v_{t-1}: eta u - d, v_t in few components."""
    eta = settings.learning_rate
    if settings.optimizer == "extrapolate":
        length = moving.extrapolation(parts, state.adapter, state.residual)
        eta *= length
        change = moving.combined(moved, eta - 1.0, {}, 0.0)
        return _Ahead(change, None, eta, {"extrapolation": length})
    beta, last = settings.beta, _velocity(own)
    before = moving.products(last, None) if last is not None else {}
    velocity = moving.combined(moved, 1.0, before, beta)
    if settings.optimizer == "momentum":  # eta (beta v + d) - d
        change = moving.combined(moved, eta - 1.0, before, eta * beta)
    else:  # eta (d + beta (beta v + d)) - d
        change = moving.combined(moved, eta * (1.0 + beta) - 1.0, before, eta * beta * beta)
    ranks = {name: settings.velocity_rank or 2 * pair.rank for name, pair in state.adapter.modules.items()}
    short = moving.shortened(velocity, ranks, dtype_of(state.adapter))
    return _Ahead(change, short.adapter, eta, {"velocity_missed": short.missed})


def _finished(
    outcome: Outcome,
    settings: ServerStep,
    before: State,
    ahead: _Ahead,
    judged: tuple[Sequence[Contribution], State],
) -> Outcome:
    """The outcome with its heads moved too, and with the velocities in the state's memory."""
    _, own = _split(before)
    answer = outcome.state
    heads = {f"extra/{n}": t for n, t in answer.adapter.extra.items() if n in before.adapter.extra}
    last = {name: before.adapter.extra[name.removeprefix("extra/")] for name in heads}
    moved, kept = stepped(last, heads, own, settings, ahead.eta)
    extra = {**answer.adapter.extra, **{n.removeprefix("extra/"): t for n, t in moved.items()}}
    adapter = Adapter(answer.adapter.modules, extra, answer.adapter.cores)
    stored = {**kept, **(ahead.velocity.tensors() if ahead.velocity is not None else {})}
    memory = {**answer.memory, **{_MEMORY + name: tensor for name, tensor in stored.items()}}
    after = replace(answer, adapter=adapter, memory=memory)
    return Outcome(after, {**outcome.notes, **ahead.notes}, judged=(judged[0], replace(judged[1], adapter=adapter)))


def _carrying(parts: Sequence[Contribution], more: Adapter | None) -> list[Contribution]:
    """The contributions, each with `more` added to what it carried frozen; what several share stays one object."""
    if more is None:
        return list(parts)
    joined: dict[int, Adapter] = {}
    result = []
    for part in parts:
        key = id(part.residual)
        if key not in joined:
            joined[key] = more if part.residual is None else _both(part.residual, more)
        result.append(replace(part, residual=joined[key]))
    return result


def _both(first: Adapter, second: Adapter) -> Adapter:
    modules = dict(first.modules)
    for name, pair in second.modules.items():
        if name in modules:
            whole = linalg.stack([modules[name], pair], [1.0, 1.0])
            pair = LoraFactors(B=whole.left.to(pair.B.dtype), A=whole.right.to(pair.A.dtype), scaling=1.0)
        modules[name] = pair
    return Adapter(modules)


def _split(state: State) -> tuple[State, dict[str, Tensor]]:
    """(the state as the strategy knows it, the optimizer's own tensors)."""
    own = {n.removeprefix(_MEMORY): t for n, t in state.memory.items() if n.startswith(_MEMORY)}
    rest = {n: t for n, t in state.memory.items() if not n.startswith(_MEMORY)}
    return replace(state, memory=rest), own


def _velocity(own: Mapping[str, Tensor]) -> Adapter | None:
    pairs = {name: tensor for name, tensor in own.items() if kind_of(name) in ("A", "B")}
    return adapter_from_tensors(pairs, {n.partition("/")[2]: 1.0 for n in pairs}) if pairs else None
