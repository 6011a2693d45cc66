"""A round of a method that works on sums alone: it asks for one after the other, of clients that trained once.

    brief, Payload.question -> client trains, keeps its update, measures it -> gate -> weighted mean, the first
    Sums.ask(means so far)  -> the same clients measure what they kept      -> gate -> weighted mean, the next
    Sums.mean(all means)    -> one contribution for Strategy.step

A client that answers one trip and not the next is missing from the later means, which are then the others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from florana.federation.collect import Collected, Gate, collect
from florana.federation.event import Event
from florana.federation.gate import Expected, RejectedUpdate, beyond, check_head, checked, loaded
from florana.federation.gather import Gathered, briefs_of, contributions, expectation, mean_metrics, require
from florana.federation.messages import Brief, Engine, Reply, pack_question
from florana.federation.noisy_mean import noisy_mean
from florana.federation.quantize import Format, form_of
from florana.federation.spool import Spool
from florana.federation.step_bounds import Reach, allowed
from florana.federation.terms import Federation
from florana.federation.trip_memory import update_in
from florana.federation.weighting import Weighed, weigh
from florana.lora.factors import Contribution, Update
from florana.strategy.base import Named, Payload, State, Strategy, Sums

MEAN = "the clients' mean"
"""How the one contribution of a round of sums is called."""


def gather_sums(
    strategy: Strategy,
    sums: Sums,
    state: State,
    chosen: Sequence[str],
    engine: Engine,
    federation: Federation,
    rows: Mapping[str, int],
    spools: Callable[[int], Spool],
    show: Callable[[Event], None],
) -> Gathered:
    """One round's means, as one contribution.

    Args:
        strategy: the method.
        sums: its own.
        state: what is broadcast.
        chosen: the clients that are asked.
        engine: reaches them.
        federation: the fixed terms of the run.
        rows: client -> its training rows, as earlier rounds had them.
        spools: trip -> where its answers are kept.
        show: told of what happens.

    Raises:
        FederationError: fewer usable answers than the minimum, in any trip.
    """
    round_ = state.round + 1
    payloads = {client: strategy.brief(state, client) for client in chosen}
    briefs = briefs_of(strategy, payloads, round_, federation)
    expected = expectation(payloads, round_, rows, federation)
    traffic = {client: {"up": 0, "down": 0} for client in chosen}
    refused: dict[str, str] = {}
    means: list[Named] = []
    trips: list[Weighed] = []
    seconds, noising = 0.0, federation.noising
    draws = noising.begin(round_, chosen, briefs[0].payload) if noising is not None else None
    # a clipped part can be no outlier, and who is left out must not follow from the others' parts
    most = federation.max_change if noising is None else math.inf
    for trip in range(sums.trips):
        question = sums.ask(state.adapter, means) if trip else {}
        if trip:
            asked = pack_question(question)
            briefs = [replace(b, payload=asked, trip=trip) for b in briefs if b.client not in refused]
        gate = _gate(sums, trip, expected, [brief.client for brief in briefs], question, most)
        collected = collect(engine, briefs, gate, spools(trip), show)
        _account(traffic, briefs, collected)
        refused |= {c: why if not trip else f"trip {trip + 1}: {why}" for c, why in collected.refused.items()}
        require(collected, len(chosen), round_, federation.minimum)
        weighed = weigh(collected.updates, payloads, federation.weighing)
        if noising is None or draws is None:
            means.append(_mean(weighed))
        else:
            asking = (sums, trip, round_, question)
            means.append(noisy_mean(weighed.updates, asking, payloads, noising.clip, noising.multiplier, draws))
        trips.append(weighed)
        seconds += collected.client_seconds
    adapter = sums.mean(state.adapter, means)
    residual = next(iter(payloads.values())).residual
    if noising is not None:  # nothing else of the clients' figures is told
        told = {"answered": [len(weighed.updates) for weighed in trips], "epsilon": noising.spent()}
        bare = [replace(update, metrics={}) for update in trips[0].updates]
        part = Contribution(MEAN, adapter, 1.0, residual)
        names = [update.client for update in bare]
        return Gathered([part], names, bare, trips[0].weights, refused, traffic, seconds, told)
    return Gathered(
        [Contribution(MEAN, adapter, 1.0, residual)],
        [update.client for update in trips[0].updates],
        trips[0].updates,
        trips[0].weights,
        refused,
        traffic,
        seconds,
        {**trips[0].notes, "answered": [len(weighed.updates) for weighed in trips]},
        _truth(trips[-1], payloads, engine),
        mean_metrics(trips[0]),
    )


def _gate(sums: Sums, trip: int, expected: Expected, asked: Sequence[str], question: Named, max_change: float) -> Gate:
    """Answers are held against what the client would have sent had it not trained: in shape, and in how far they are
    from it."""
    known: dict[tuple[int, int, Reach | None], tuple[Named, Mapping[str, float] | None]] = {}

    def held(client: str, reach: Reach | None = None) -> tuple[Named, Mapping[str, float] | None]:
        """What it would have sent untrained, and how far from that it can be; once for all that were sent the same."""
        sent = expected.clients[client]
        key = (id(sent.adapter), id(sent.question) if sent.question else 0, reach)
        if key not in known:
            asking = (trip, expected.round, question if trip else sent.question, sent.adapter)
            may = None if reach is None else allowed(reach, sent.adapter.tensors(), sent.work.trains)
            known[key] = sums.measure(*asking, sent.adapter), None if may is None else sums.bounds(*asking, may)
        return known[key]

    def check(reply: Reply, seen: Collection[str], form: Format) -> Update:
        check_head(reply, expected, seen)
        if reply.client not in asked:
            raise RejectedUpdate("was not asked in this trip")
        like, bounds = held(reply.client, expected.reach(reply.examples) if expected.reach is not None else None)
        tensors = checked(loaded(reply.payload, form_of(like, form)), like, form)
        if bounds is not None:
            _within(tensors, like, bounds)
        sent = expected.clients[reply.client]
        return Update(reply.client, reply.round, sent.adapter, reply.examples, dict(reply.metrics), tensors)

    def large(updates: Sequence[Update]) -> Mapping[str, str]:
        return beyond({u.client: _moved(u.measured, held(u.client)[0]) for u in updates}, max_change, _CALLED)

    return Gate(
        expected.round,
        asked,
        check,
        lambda update: update.measured,
        lambda update, kept: replace(update, measured=kept),
        large,
    )


ROUNDED = 1.001
"""Bounds are float64's, and what they bound was rounded to float32."""


def _within(tensors: Named, before: Named, bounds: Mapping[str, float]) -> None:
    """Raise RejectedUpdate where a number is further from an untrained client's than any training can bring it."""
    for name, tensor in tensors.items():
        moved, most = float((tensor.double() - before[name].double()).abs().max()), ROUNDED * bounds[name] + 1e-6
        if moved > most:
            raise RejectedUpdate(
                f"'{name}' was changed {moved / most:.1f} times as much as any training of this recipe can"
            )


def _moved(tensors: Named, before: Named) -> dict[str, float]:
    """Kind -> how far the tensors of that kind are from what they were."""
    squares: dict[str, list[float]] = {}
    for name, tensor in tensors.items():
        moved = float((tensor.double() - before[name].double()).norm())
        squares.setdefault(name.partition("/")[0], []).append(moved)
    return {kind: math.hypot(*sizes) for kind, sizes in squares.items()}


_CALLED = {"extra": "the tensors trained whole"}


def _mean(weighed: Weighed) -> dict[str, Tensor]:
    """The weighted mean of what clients measured, summed in float64 in the order of their names."""
    total: dict[str, Tensor] = {}
    for update in weighed.updates:
        for name, tensor in update.measured.items():
            term = weighed.weights[update.client] * tensor.double()
            total[name] = term if name not in total else total[name] + term
    like = weighed.updates[0].measured
    return {name: tensor.to(like[name].dtype) for name, tensor in total.items()}


def _truth(weighed: Weighed, payloads: Mapping[str, Payload], engine: Engine) -> list[Contribution] | None:
    """The own updates of the clients of the last sum, where the engine holds their memories: a simulation knows what no
    server sees."""
    held = engine.memories()
    parts = []
    for part in contributions(weighed, payloads):
        own = update_in(held.get(part.client, {}), part.adapter.scalings)
        if own is None:
            return None
        parts.append(replace(part, adapter=own[1]))
    return parts


def _account(traffic: dict[str, dict[str, int]], briefs: Sequence[Brief], collected: Collected) -> None:
    for brief in briefs:
        traffic[brief.client]["up"] += collected.bytes_up[brief.client]
        traffic[brief.client]["down"] += len(brief.payload)
