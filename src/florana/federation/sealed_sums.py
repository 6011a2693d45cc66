"""A round of secure sums: clients train, and the server learns their means, and no client's own part.

    brief (sealed) -> trained -> keys -> shares -> [masked -> survivors -> reveal -> opened -> mean] for each trip
                                                                    -> one contribution for Strategy.step

A client that leaves at any step is missing from then on; a sum over fewer clients than the minimum is never opened, by
the clients' own word.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from florana.errors import FederationError, FloranaError, RecipeError
from florana.federation.entrywise import entrywise
from florana.federation.event import Event
from florana.federation.gather import Gathered, briefs_of
from florana.federation.messages import Brief, Engine, Reply, Step
from florana.federation.sampling import derive
from florana.federation.sealed_question import Question
from florana.federation.sealed_table import FIX, Table
from florana.federation.terms import Federation, Sealing
from florana.federation.trip_memory import LOSS, update_in
from florana.federation.trips import MEAN
from florana.lora.factors import Contribution
from florana.secure import opening, wire
from florana.secure.fixed_point import Grid, count, decoded
from florana.secure.masks import Numbers, unpacked
from florana.secure.session import Public, Terms
from florana.secure.session_keys import Refused
from florana.strategy.base import Named, Payload, State, Strategy


def gather_sealed(
    strategy: Strategy,
    sealing: Sealing,
    state: State,
    chosen: Sequence[str],
    engine: Engine,
    federation: Federation,
    show: Callable[[Event], None],
) -> Gathered:
    """One round's means, as one contribution.

    Args:
        strategy: a method that needs sums alone.
        sealing: what the recipe says of secure sums.
        state: what is broadcast.
        chosen: the clients that are asked.
        engine: reaches them.
        federation: the fixed terms of the run.
        show: told of what happens.

    Raises:
        FederationError: fewer clients than the minimum are left, or a secret cannot be put together: no sum.
        RecipeError: the method or the training does not say how large its numbers can become.
    """
    round_ = state.round + 1
    payloads = {client: strategy.brief(state, client) for client in chosen}
    first = next(iter(payloads.values()))
    heads = min((len(core) for core in first.adapter.cores.values()), default=0)
    if any(payload.blocks is not None and len(payload.blocks) < heads for payload in payloads.values()):
        raise RecipeError(
            f"'{strategy.name}' with some heads per client does not go with secure sums",
            fix="leave out model.client_ranks and strategy.heads_per_client",
        )
    sums = strategy.sums or entrywise(sorted(first.work.up))
    briefs = briefs_of(strategy, payloads, round_, federation)
    table = Table(engine, show, round_, [], traffic={client: {"up": 0, "down": 0} for client in chosen})
    seconds, attempt, begun = 0.0, 0, None
    while begun is None:
        seconds += _trained(table, [_attempted(brief, federation, attempt) for brief in briefs])
        table.enough("have trained", len(chosen), sealing.minimum)
        word, trips = secrets.token_hex(16), tuple(range(sums.trips))
        terms = Terms(word, sealing.run, round_, attempt, trips, sealing.bits, sealing.most, sealing.minimum)
        begun, attempt = _begin(table, terms, final=attempt + 1 == ATTEMPTS), attempt + 1
    roster, sealed = begun
    table.enough("shared out", len(chosen), sealing.minimum)
    grid = Grid(terms.bits, len(roster), terms.most)
    means: list[Named] = []
    opened: list[int] = []
    rows, loss, present = 0, 0.0, list(table.here)
    joined = present
    for trip in range(sums.trips):
        asked = Question(sums, trip, payloads, state, means, federation, sealing)
        total, present = _sum(table, terms, roster, sealed, present, asked, grid)
        values, counted = decoded(total, asked.shapes, asked.bounds, grid)
        if not trip:
            loss, rows, joined = float(values.pop(LOSS)), counted, present
        means.append(asked.means(values))
        opened.append(len(present))
    adapter = sums.mean(state.adapter, means)
    return Gathered(
        parts=[Contribution(MEAN, adapter, 1.0, first.residual)],
        clients=joined,
        updates=[],
        weights={},
        refused=table.refused,
        traffic=table.traffic,
        seconds=seconds,
        notes={"answered": opened, "rows": rows, "secure": {"min_clients": terms.minimum, "bits": terms.bits}},
        # of parts with noise, how far the sum is from the truth would be told without any
        truth=None if sealing.clip is not None else _truth(payloads, present, engine, federation, sealing),
        metrics={"train_loss": loss} if sealing.losses else {},
    )


ATTEMPTS = 3
"""A round is trained so often at most, where the server ended just as its sums were opened."""


def _attempted(brief: Brief, federation: Federation, attempt: int) -> Brief:
    """The brief of an attempt: each has updates of its own, so that no update is in two sums."""
    seed = derive(federation.seed, "client", brief.round, brief.client, "again", attempt) if attempt else brief.seed
    return replace(brief, trip=0, sealed=True, evaluate=False, attempt=attempt, seed=seed)


def _trained(table: Table, briefs: Sequence[Brief]) -> float:
    """Have the clients train; the seconds that they took."""
    asked, seconds = {brief.client for brief in briefs}, 0.0
    table.here, table.refused, table.spent = [], {}, set()  # an attempt before this one says nothing of it
    for brief in briefs:
        table.traffic[brief.client]["down"] += len(brief.payload)
    for answer in table.engine.fit(briefs):
        if not isinstance(answer, Reply):
            table.lost(answer.client, answer.reason)
            table.spent |= {answer.client} if answer.spent else set()
        elif answer.client in asked - set(table.here) and answer.round == table.round_ and not answer.payload:
            table.here.append(answer.client)
            seconds += answer.seconds
            table.show(Event("reply", table.round_, answer.client))
        else:
            table.lost(answer.client, "answered something else than that it has trained")
    table.here.sort()
    return seconds


def _begin(table: Table, terms: Terms, *, final: bool) -> tuple[dict[str, Public], dict[str, dict[str, bytes]]] | None:
    """The roster, and holder -> owner -> sealed shares, of those who shared out.

    None where a client has opened a sum of these updates before: it takes another attempt, unless this is the `final`.
    """
    asked = Step({"step": "keys", "terms": wire.terms_to(terms)})
    roster: dict[str, Public] = {}
    answers = table.ask("keys", dict.fromkeys(table.here, asked))
    spent = [client for client, answer in answers.items() if answer.head.get("spent") is True]
    if spent and not final:
        detail = "a sum was opened just before the server ended: the clients train this round anew"
        table.show(Event("repaired", table.round_, detail=detail))
        return None
    for client, answer in answers.items():
        try:
            roster[client] = wire.public_from(answer.head.get("keys"))
        except Refused as error:
            table.lost(client, "keys: its sum was opened before" if client in spent else str(error.what))
    told = {name: wire.public_to(public) for name, public in roster.items()}
    asked = Step({"step": "shares", "session": terms.session, "roster": told})
    sealed: dict[str, dict[str, bytes]] = {}
    for client, answer in table.ask("shares", dict.fromkeys(table.here, asked)).items():
        try:
            sealed[client] = wire.words_from(answer.head.get("sealed"))
        except Refused as error:
            table.lost(client, str(error.what))
    return roster, opening.routed(sealed)


def _sum(
    table: Table,
    terms: Terms,
    roster: Mapping[str, Public],
    sealed: Mapping[str, Mapping[str, bytes]],
    present: Sequence[str],
    asked: Question,
    grid: Grid,
) -> tuple[Numbers, list[str]]:
    """One trip's sum, and whose it is: of those that sent their part, whether or not they stayed to the end."""
    trip, size = asked.trip, count(asked.shapes, grid)
    steps = {client: asked.step(terms, client, sealed.get(client, {}), present) for client in table.here}
    vectors: dict[str, Numbers] = {}
    for client, answer in table.ask(f"trip {trip + 1}", steps).items():
        try:
            vectors[client] = unpacked(answer.payload, size, terms.bits)
        except ValueError as error:
            table.lost(client, f"trip {trip + 1}: sent {error}")
    survivors = sorted(vectors)
    table.enough(f"sent their part in trip {trip + 1}", len(present), terms.minimum)
    named = {"session": terms.session, "trip": trip}
    step = Step({"step": "survivors", "names": survivors, **named})
    signatures = {}
    for client, answer in table.ask("survivors", dict.fromkeys(survivors, step)).items():
        try:
            signatures[client] = wire.word(answer.head.get("signature"))
        except Refused as error:
            table.lost(client, str(error.what))
    step = Step({"step": "reveal", "signatures": wire.words_to(signatures), **named})
    revealed = {}
    for client, answer in table.ask("reveal", dict.fromkeys(sorted(signatures), step)).items():
        try:
            revealed[client] = wire.words_from(answer.head.get("shares"))
        except Refused as error:
            table.lost(client, str(error.what))
    try:
        return opening.opened(terms, roster, trip, present, vectors, revealed), survivors
    except FloranaError as error:
        raise FederationError(
            f"round {table.round_}: {error.what}", why=error.why or table.reasons(), fix=FIX
        ) from None


def _truth(
    payloads: Mapping[str, Payload], last: Sequence[str], engine: Engine, federation: Federation, sealing: Sealing
) -> list[Contribution] | None:
    """The own updates of the clients of the last sum, where a simulation holds their memories and knows their rows."""
    held, parts = engine.memories(), []
    for client in last:
        own = update_in(held.get(client, {}), payloads[client].adapter.scalings)
        if own is None or (client not in federation.examples and sealing.most > 1):
            return None
        weight = min(federation.examples.get(client, 1), sealing.most)
        parts.append(Contribution(client, own[1], float(weight), payloads[client].residual))
    return parts
