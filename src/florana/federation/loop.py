"""The round loop: sample, brief, collect through the gate, aggregate, measure, commit. The same for every engine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from florana.aggregate.error import AggregationError, measure
from florana.errors import BudgetSpent
from florana.federation.event import Event
from florana.federation.gather import Gathered, gather
from florana.federation.journal import Journal, first_rows, read_records
from florana.federation.messages import Engine
from florana.federation.round_record import RoundRecord, slim
from florana.federation.sampling import sample
from florana.federation.spool import Spool
from florana.federation.terms import Federation
from florana.federation.trip_memory import lasting
from florana.federation.trips import gather_sums
from florana.lora.factors import Update
from florana.strategy.base import Outcome, State, Strategy


def run_rounds(
    strategy: Strategy,
    state: State,
    engine: Engine,
    federation: Federation,
    journal: Journal,
    show: Callable[[Event], None],
) -> State:
    """All rounds after `state.round`, each committed before the next begins; returns the last state. Where privacy
    budgets leave too few clients for another round, the run ends before it.

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
        try:
            state, record = _one_round(strategy, state, engine, federation, rows, journal.folder, show)
        except BudgetSpent as reason:
            show(Event("ended", state.round, detail=f"the privacy budget is spent ({reason.why or reason.what})"))
            return state
        journal.commit(state, record, lasting(engine.memories()))
        Spool(journal.folder, state.round).remove()
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
    run: Path,
    show: Callable[[Event], None],
) -> tuple[State, RoundRecord]:
    round_ = state.round + 1
    chosen = sample(federation.clients, federation.per_round, federation.seed, round_)
    show(Event("round", round_, detail=str(len(chosen))))
    spools = functools.partial(Spool, run, round_)
    if federation.sealing is not None:
        from florana.federation.sealed_sums import gather_sealed  # needs an extra's packages

        came = gather_sealed(strategy, federation.sealing, state, chosen, engine, federation, show)
    elif strategy.sums is None:
        came = gather(strategy, state, chosen, engine, federation, rows, spools(0), show)
    else:
        came = gather_sums(strategy, strategy.sums, state, chosen, engine, federation, rows, spools, show)
    started = time.perf_counter()
    outcome = strategy.step(state, came.parts)
    server_seconds = time.perf_counter() - started
    error = _error(strategy, outcome, came)
    if federation.uplink != "float32":
        error = {**error, "uplink": came.metrics.get("uplink_error")}
    traffic = came.traffic
    record = RoundRecord(
        round=round_,
        strategy=strategy.name,
        clients=list(came.clients),
        refused=dict(sorted(came.refused.items())),
        examples={update.client: update.examples for update in came.updates},
        weights=dict(came.weights),
        train_loss=came.metrics.get("train_loss"),
        eval=_scores(outcome.state, came.updates, federation, one_model=strategy.facts.one_model),
        bytes_up=sum(sizes["up"] for sizes in traffic.values()),
        bytes_down=sum(sizes["down"] for sizes in traffic.values()),
        server_seconds=server_seconds,
        client_seconds=came.seconds,
        error=error,
        notes={**outcome.notes, **came.notes, **_spent(came)},
        traffic=traffic,
    )
    return outcome.state, record


def _spent(came: Gathered) -> dict[str, object]:
    """The most that was spent on any client's rows, where clients tell."""
    told = [update.metrics["epsilon"] for update in came.updates if "epsilon" in update.metrics]
    return {"epsilon": max(told)} if told else {}


def _error(strategy: Strategy, outcome: Outcome, came: Gathered) -> Mapping[str, object]:
    """How far the step is from the clients' true mean, where anybody has their updates."""
    if not strategy.facts.one_model or came.truth is None:
        return {"overall": None, "optimum": None, "per_module": {}}
    aimed, answer = outcome.judged or (came.truth, outcome.state)
    if came.truth is not came.parts and outcome.judged is not None:  # the optimizer moved the mean that it was given
        aimed = [replace(part, residual=aimed[0].residual) for part in came.truth]
    return _error_json(measure(aimed, answer.adapter, answer.residual))


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
