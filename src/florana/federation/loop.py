"""The round loop: sample, brief, collect through the gate, aggregate, measure, commit. The same for every engine."""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from florana.aggregate.error import AggregationError, measure
from florana.errors import FederationError
from florana.federation.collect import collect
from florana.federation.event import Event
from florana.federation.gate import MAX_CHANGE, Expected
from florana.federation.journal import Journal, first_rows, read_records
from florana.federation.messages import Brief, Engine, pack
from florana.federation.quantize import Format
from florana.federation.round_record import RoundRecord, slim
from florana.federation.sampling import derive, sample
from florana.federation.spool import Spool
from florana.federation.step_bounds import Reach
from florana.federation.weighting import Weighing, weigh
from florana.lora.factors import Contribution, Update
from florana.strategy.base import Payload, State, Strategy

_CARRIED = {"stay": ["A", "B", "core", "extra"], "move": ["extra"]}
"""Kinds of tensors whose rounding a client carries over, by `strategy.facts.Facts.coordinates`."""

Scores = Mapping[str, float]
"""Metric name -> value."""


@dataclass(frozen=True, eq=False)
class Federation:
    """The fixed facts of a run.

    Args:
        clients: all client names.
        rounds: how many rounds there are in all.
        per_round: how many clients take part in each round.
        seed: of sampling and of the clients' training.
        weighing: how much each update counts.
        evaluate: scores of a state's global model, or None where the server cannot measure.
        measured: whether a round is one that is measured.
        personal: whether a round is one in which clients measure their own models.
        minimum: the fewest usable updates.
        examples: client -> its training rows, where the server knows them.
        uplink: how clients write what they send, see `federation.quantize`.
        max_change: see `gate.oversized`.
        validate: as `evaluate`, on the rows to choose by; None where there are none.
        enough: whether the run ends with these records, before its last round.
        reach: training rows -> see `federation.step_bounds`; None where nobody knows.
    """

    clients: Sequence[str]
    rounds: int
    per_round: int
    seed: int
    weighing: Weighing
    evaluate: Callable[[State], Scores] | None
    measured: Callable[[int], bool]
    personal: Callable[[int], bool]
    minimum: int = 1
    examples: Mapping[str, int] = field(default_factory=dict)
    uplink: Format = "float32"
    max_change: float = MAX_CHANGE
    validate: Callable[[State], Scores] | None = None
    enough: Callable[[Sequence[RoundRecord]], bool] = lambda records: False
    reach: Callable[[int], Reach | None] | None = None


def run_rounds(
    strategy: Strategy,
    state: State,
    engine: Engine,
    federation: Federation,
    journal: Journal,
    show: Callable[[Event], None],
) -> State:
    """All rounds after `state.round`, each committed before the next begins; returns the last state.

    Args:
        strategy: the method.
        state: where to go on from.
        engine: reaches the clients.
        federation: the fixed facts of the run.
        journal: where rounds are committed.
        show: told of what happens.

    Raises:
        FederationError: fewer usable updates than the minimum; the rounds before stand.
    """
    records = read_records(journal.folder / "rounds.jsonl")
    rows = first_rows(records)
    records = [slim(record) for record in records]
    while state.round < federation.rounds and not federation.enough(records):
        spool = Spool(journal.folder, state.round + 1)
        state, record = _one_round(strategy, state, engine, federation, rows, spool, show)
        journal.commit(state, record, engine.memories())
        spool.remove()
        rows = {**record.examples, **rows}
        records.append(slim(record))
        show(Event("committed", state.round, record=record))
    if state.round < federation.rounds:
        show(Event("ended", state.round, detail="nothing better for evaluate.patience measured rounds"))
    return state


def _one_round(
    strategy: Strategy,
    state: State,
    engine: Engine,
    federation: Federation,
    rows: Mapping[str, int],
    spool: Spool,
    show: Callable[[Event], None],
) -> tuple[State, RoundRecord]:
    round_ = state.round + 1
    chosen = sample(federation.clients, federation.per_round, federation.seed, round_)
    show(Event("round", round_, detail=str(len(chosen))))
    payloads = {client: strategy.brief(state, client) for client in chosen}
    briefs = _briefs(strategy, payloads, round_, federation)
    # read while answers come in: a site that joins during the round is held to the rows it said
    known: Mapping[str, int] = ChainMap(federation.examples, rows)  # type: ignore[arg-type]
    expected = Expected(round_, payloads, known, federation.uplink, federation.reach)
    collected = collect(engine, briefs, expected, spool, federation.max_change, show)
    updates = sorted(collected.updates, key=lambda update: update.client)
    if len(updates) < max(1, federation.minimum):
        reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(collected.refused.items()))
        raise FederationError(
            f"round {round_} has {len(updates)} usable updates of {len(chosen)} clients asked, "
            f"and needs {max(1, federation.minimum)}",
            why=reasons or "no client answered",
            fix="mend the clients named and run again with --resume: the rounds before this one are committed",
        )
    weighed = weigh(updates, payloads, federation.weighing)
    kept, weights = weighed.updates, weighed.weights
    parts = [
        Contribution(update.client, update.adapter, weights[update.client], sent.residual, sent.blocks)
        for update, sent in ((update, payloads[update.client]) for update in kept)
    ]
    started = time.perf_counter()
    outcome = strategy.step(state, parts)
    server_seconds = time.perf_counter() - started
    error: Mapping[str, object] = {"overall": None, "optimum": None, "per_module": {}}
    if strategy.facts.one_model:
        aimed, answer = outcome.judged or (parts, outcome.state)
        error = _error_json(measure(aimed, answer.adapter, answer.residual))
    if federation.uplink != "float32":
        error = {**error, "uplink": _weighted("uplink_error", kept, parts)}
    record = RoundRecord(
        round=round_,
        strategy=strategy.name,
        clients=[update.client for update in kept],
        refused=dict(sorted(collected.refused.items())),
        examples={update.client: update.examples for update in kept},
        weights=dict(weights),
        train_loss=_weighted("train_loss", kept, parts),
        eval=_scores(outcome.state, kept, federation, one_model=strategy.facts.one_model),
        bytes_up=sum(collected.bytes_up.values()),
        bytes_down=sum(len(brief.payload) for brief in briefs),
        server_seconds=server_seconds,
        client_seconds=collected.client_seconds,
        error=error,
        notes={**outcome.notes, **weighed.notes},
        traffic={
            brief.client: {"up": collected.bytes_up[brief.client], "down": len(brief.payload)} for brief in briefs
        },
    )
    return outcome.state, record


def _briefs(strategy: Strategy, payloads: Mapping[str, Payload], round_: int, federation: Federation) -> list[Brief]:
    packed: dict[tuple[int, int], bytes] = {}  # clients that get the same objects get the same bytes
    briefs = []
    for client, payload in payloads.items():
        key = (id(payload.adapter), id(payload.residual))
        if key not in packed:
            packed[key] = pack(payload.adapter, payload.work.down, payload.residual)
        briefs.append(
            Brief(
                round=round_,
                client=client,
                seed=derive(federation.seed, "client", round_, client),
                payload=packed[key],
                evaluate=federation.personal(round_),
                trains=sorted(payload.work.trains),
                returns=sorted(payload.work.up),
                scalings=payload.adapter.scalings,
                blocks=payload.blocks,
                pruning=payload.pruning,
                uplink=federation.uplink,
                feedback=[] if federation.uplink == "float32" else _CARRIED[strategy.facts.coordinates],
            )
        )
    return briefs


def _weighted(name: str, updates: Sequence[Update], parts: Sequence[Contribution]) -> float | None:
    if any(name not in update.metrics for update in updates):
        return None
    return sum(update.metrics[name] * part.weight for update, part in zip(updates, parts, strict=True))


def _scores(
    state: State, updates: Sequence[Update], federation: Federation, *, one_model: bool
) -> dict[str, dict[str, float]]:
    """`global`: the server's model on the common test set. `validation`: the same model on the rows to choose by.
    `personal`: the mean over this round's clients of a client's own model on its local test split.
    `clients_on_common`: the same models on the common test set, averaged. `gap` = personal - global."""
    scores: dict[str, dict[str, float]] = {}
    if one_model and federation.measured(state.round) and federation.evaluate is not None:
        scores["global"] = dict(federation.evaluate(state))
    if one_model and federation.measured(state.round) and federation.validate is not None:
        scores["validation"] = dict(federation.validate(state))
    for figure in ("personal", "clients_on_common"):
        prefix = f"{figure}/"
        names = sorted({n for update in updates for n in update.metrics if n.startswith(prefix)})
        for name in names:
            values = [update.metrics[name] for update in updates if name in update.metrics]
            scores.setdefault(figure, {})[name.removeprefix(prefix)] = sum(values) / len(values)
    if "global" in scores and "personal" in scores:
        shared = scores["global"].keys() & scores["personal"].keys()
        scores["gap"] = {name: scores["personal"][name] - scores["global"][name] for name in sorted(shared)}
    return scores


def _error_json(error: AggregationError) -> dict[str, object]:
    return {
        "overall": error.error,
        "optimum": error.optimum,
        "per_module": {name: {"error": m.error, "optimum": m.optimum} for name, m in error.modules.items()},
    }
