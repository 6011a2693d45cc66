"""The clients' mean product in two sums (`aggregate.best_rank.sketch`): Y = T Omega, then Z = Q^T T; and T is near Q Z.

The tensors that clients train whole (heads) are averaged in the first trip. Clients of lower ranks are told the A of
the whole broadcast, so that all have the same Omega.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from florana.aggregate import validate
from florana.aggregate.best_rank import sketch
from florana.aggregate.best_rank.project import terms
from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution
from florana.strategy.base import Allowed, Named, Payload, State, Strategy, Sums

RANGE, PROJECTION, WARM = "range/", "projection/", "warm/"


Omega = Callable[[Tensor, int, str, int], Tensor]
"""(the A that was sent, k, the module's name, the round) -> Omega, (in, k)."""


def near_A(A: Tensor, columns: int, name: str, round_: int) -> Tensor:  # noqa: N802
    """The rows of the A that was sent, and random directions, new in every round."""
    return sketch.directions(A, columns, A.shape[1], f"{name} {round_}")


def random_once(A: Tensor, columns: int, name: str, round_: int) -> Tensor:
    """Random directions, the same in all rounds."""
    del round_
    return sketch.directions(None, columns, A.shape[1], name)


def columns_of(given: int | None, otherwise: int) -> tuple[str, Callable[[int], int]]:
    """k as a formula and as a function of the rank: the option `sketch`, or so many times the rank.

    Raises:
        RecipeError: fewer columns than one.
    """
    if given is not None and given < 1:
        raise RecipeError(f"strategy.sketch is {given}, not at least 1", fix="leave it out")
    if given is not None:
        return str(given), lambda rank: given
    return ("r" if otherwise == 1 else f"{otherwise} r"), lambda rank: otherwise * rank


def two_trips(columns: Callable[[int], int], omega: Omega) -> Sums:
    """The two sums.

    Args:
        columns: the rank that the server sends -> k; no module takes more than its smaller side.
        omega: `near_A` or `random_once`.
    """

    def ask(sent: Adapter, means: Sequence[Named]) -> Named:
        del sent
        return {n: sketch.basis(Y) for n, Y in means[0].items() if n.startswith(RANGE)} if len(means) == 1 else {}

    def measure(trip: int, round_: int, question: Named, received: Adapter, trained: Adapter) -> Named:
        if trip:
            return {
                PROJECTION + name: sketch.projected(pair, question[RANGE + name])
                for name, pair in trained.modules.items()
            }
        found: dict[str, Tensor] = {f"extra/{name}": tensor for name, tensor in trained.extra.items()}
        for name, pair in trained.modules.items():
            A = question.get(WARM + name, received.modules[name].A)
            wide = min(columns(len(A)), *pair.shape)
            found[RANGE + name] = sketch.ranged(pair, omega(A, wide, name, round_))
        return found

    def mean(sent: Adapter, means: Sequence[Named]) -> Adapter:
        first, second = means
        modules = {
            name: sketch.whole(sketch.basis(first[RANGE + name]), second[PROJECTION + name], pair.scaling)
            for name, pair in sent.modules.items()
        }
        return Adapter(modules, {n.removeprefix("extra/"): t for n, t in first.items() if n.startswith("extra/")})

    def bounds(trip: int, round_: int, question: Named, received: Adapter, allowed: Allowed) -> dict[str, float]:
        found = {f"extra/{name}": float(allowed(f"extra/{name}").max()) for name in received.extra} if not trip else {}
        for name, pair in received.modules.items():
            reach = allowed(f"B/{name}"), allowed(f"A/{name}")
            if trip:
                found[PROJECTION + name] = sketch.projection_bound(pair, *reach, question[RANGE + name])
            else:
                A = question.get(WARM + name, pair.A)
                directions = omega(A, min(columns(len(A)), *pair.shape), name, round_)
                found[RANGE + name] = sketch.range_bound(pair, *reach, directions)
        return found

    return Sums(2, ask, measure, mean, bounds)


def told(payload: Payload, whole: Adapter) -> Payload:
    """The part of a client of a lower rank, with the whole broadcast's A beside it."""
    return replace(payload, question={WARM + name: pair.A.clone() for name, pair in whole.modules.items()})


def seen(strategy: Strategy, state: State, parts: Sequence[Contribution]) -> Sequence[Contribution]:
    """What the strategy's server has of these updates: them, or the one mean that it learns from sums of them.

    Args:
        strategy: any.
        state: what was broadcast.
        parts: the clients' updates, weighted.

    Raises:
        InputError: the updates do not fit together.
    """
    sums = strategy.sums
    if sums is None:
        return parts
    for _ in terms(parts):  # as every rule does: what does not fit is named
        pass
    validate.average_extra(parts)
    total = sum(part.weight for part in parts)
    means: list[Named] = []
    for trip in range(sums.trips):
        mean: dict[str, Tensor] = {}
        types: dict[str, torch.dtype] = {}
        for part in parts:
            sent = strategy.brief(state, part.client)
            question = sums.ask(state.adapter, means) if trip else sent.question
            for name, tensor in sums.measure(trip, state.round + 1, question, sent.adapter, part.adapter).items():
                term = part.weight / total * tensor.double()
                mean[name] = term if name not in mean else mean[name] + term
                types[name] = tensor.dtype
        means.append({name: tensor.to(types[name]) for name, tensor in mean.items()})
    return [Contribution("mean", sums.mean(state.adapter, means), 1.0, parts[0].residual)]
