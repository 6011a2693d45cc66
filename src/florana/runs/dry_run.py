"""What a run will take, before it starts: clients, bytes, memory and time, from a real step of the real model."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from florana.federation.entrywise import entrywise
from florana.federation.error_feedback import packed_size
from florana.federation.messages import pack, pack_question, travelling
from florana.lora.factors import kind_of
from florana.recipe import schema as r
from florana.recipe.privacy_words import budget_said
from florana.runs.chosen_strategy import strategy_of
from florana.runs.noisy_sums import multipliers
from florana.runs.prepared import Setup
from florana.runs.setup import first_state
from florana.score.benchmarks import figure_names
from florana.strategy.base import Named, Payload, Strategy
from florana.strategy.custom import plain_name
from florana.train.client import steps_per_round, train_locally
from florana.train.evaluate import evaluate
from florana.train.generate import cut_prompts, generate

SLOW = 5.0
"""Seconds of a first step beyond which no others are measured."""


@dataclass(frozen=True)
class Writing:
    """What the model will be asked to write.

    Args:
        task: the benchmark's name.
        problems: how many problems there are.
        samples: answers per problem.
        times: how often in the run.
        cut_prompts: how many are too long for the model.
        figures: the names of the figures.
        seconds: in all, from a few measured tokens; an upper bound, as answers may end early.
    """

    task: str
    problems: int
    samples: int
    times: int
    cut_prompts: int
    figures: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Args:
        strategy: the strategy's name.
        clients: client -> training rows.
        own_test: client -> rows of its local test split.
        common_test: rows of the common test set.
        per_round: clients asked each round.
        rounds: how many rounds.
        steps: optimizer steps per client and round (the mean).
        training: the keys of [train] with what they are set to: length, rows, rate, and all that are not the default.
        trainable_parameters: how many parameters are trained.
        base_parameters: how many parameters are frozen.
        bytes_up: bytes from all clients in the first round.
        bytes_down: bytes to all clients in the first round; methods with a frozen part send more as it grows.
        memory: peak of this process after one training step, bytes; None where the system does not tell.
        seconds_per_step: one measured optimizer step.
        seconds: the whole run, scoring included (an estimate).
        writing: what [generation] asks for, or None.
        left_out: `train` or `test` -> rows of instructions without room for a response.
        cut_responses: `train` or `test` -> rows whose response lost its end.
        noise: client -> the noise multiplier that its privacy budget takes; empty where the recipe has none.
        budget: of each client's rows, in words.
    """

    strategy: str
    clients: dict[str, int]
    own_test: dict[str, int]
    common_test: int
    per_round: int
    rounds: int
    steps: float
    training: dict[str, Any]
    trainable_parameters: int
    base_parameters: int
    bytes_up: int
    bytes_down: int
    memory: int | None
    seconds_per_step: float
    seconds: float
    writing: Writing | None
    left_out: dict[str, int]
    cut_responses: dict[str, int]
    noise: dict[str, float] = field(default_factory=dict)
    budget: str = ""

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON's own types."""
        return asdict(self)


def plan(recipe: r.Recipe, setup: Setup, *, timed_steps: int = 3) -> Plan:
    """Measure a few steps of the largest client and one batch of scoring; the adapter is put back as it was.

    Where a first step takes long, as a GPU's recipe does on processors, it is the measurement.
    """
    rows = {client: len(data.train) for client, data in setup.clients.items()}
    per_round = recipe.federation.clients_per_round or len(rows)
    largest = setup.clients[max(rows, key=lambda client: (rows[client], client))].bins

    def timed(steps: int) -> float:
        few = recipe.train.model_copy(update={"steps": steps, "epochs": None})
        started = time.perf_counter()
        train_locally(setup.bench, largest, few, 0, lambda: None)
        return (time.perf_counter() - started) / steps

    per_step = timed(1)  # warm-up: allocations, kernels
    if per_step < SLOW:
        per_step = timed(timed_steps)
    sample = setup.common[: recipe.evaluate.batch_size]
    started = time.perf_counter()
    evaluate(setup.bench, sample, recipe.evaluate.batch_size)
    scoring = (time.perf_counter() - started) / len(sample) * len(setup.common)
    writing = _writing(recipe, setup)
    setup.bench.load(setup.start)
    down, up, trained = _traffic(recipe, setup)
    steps = sum(steps_per_round(recipe.train, len(data.bins)) for data in setup.clients.values()) / len(rows)
    scorings = recipe.federation.rounds / recipe.evaluate.every + 1
    return Plan(
        strategy=plain_name(recipe.strategy["name"]),
        clients=rows,
        own_test={client: len(data.test) for client, data in setup.clients.items()},
        common_test=len(setup.common),
        per_round=per_round,
        rounds=recipe.federation.rounds,
        steps=steps,
        training=_training(recipe),
        trainable_parameters=trained,
        base_parameters=setup.bench.base_parameters,
        bytes_up=round(per_round * up),
        bytes_down=round(per_round * down),
        memory=peak_memory(),
        seconds_per_step=per_step,
        seconds=recipe.federation.rounds * per_round * steps * per_step / min(recipe.engine.workers, per_round)
        + scorings * scoring
        + (writing.seconds if writing is not None else 0.0),
        writing=writing,
        left_out=dict(setup.partition.get("left_out", {})),
        cut_responses=dict(setup.partition.get("cut_responses", {})),
        noise=multipliers(recipe, rows),
        budget=budget_said(recipe.privacy.model_dump()) if recipe.privacy.unit else "",
    )


def _training(recipe: r.Recipe) -> dict[str, Any]:
    """What a reader of the plan wants to see of [train], in the order of the schema."""
    always, given = ("steps", "epochs", "batch_size", "learning_rate", "optimizer"), recipe.train.model_dump()
    fields = type(recipe.train).model_fields
    return {
        key: value
        for key, value in given.items()
        if value is not None and (key in always or value != fields[key].default)
    }


def _writing(recipe: r.Recipe, setup: Setup, measured: int = 4) -> Writing | None:
    """One batch writes a token, then a few more, and is taken for all: every batch, every token, every time."""
    benchmark, own = setup.benchmark, recipe.generation
    if benchmark is None or own is None:
        return None
    rounds = recipe.federation.rounds
    times = sum(benchmark.due(round_, rounds) for round_ in range(1, rounds + 1))

    def timed(tokens: int) -> float:
        started = time.perf_counter()
        generate(
            setup.bench,
            benchmark.prompts[: own.batch_size],
            max_new_tokens=tokens,
            batch_size=own.batch_size,
            opening=benchmark.opening,
        )
        return time.perf_counter() - started

    timed(1)  # warm-up
    first = timed(1)
    per_token = max(0.0, timed(1 + measured) - first) / measured if own.max_new_tokens > measured else first
    batches = -(-len(benchmark.prompts) * own.samples // own.batch_size)
    return Writing(
        task=own.task,
        problems=len(benchmark.rows),
        samples=own.samples,
        times=times,
        cut_prompts=cut_prompts(setup.bench, benchmark.prompts, own.max_new_tokens, benchmark.opening),
        figures=(*figure_names(own.task, own.k), "cut_prompts"),
        seconds=times * batches * (first + (own.max_new_tokens - 1) * per_token),
    )


def _traffic(recipe: r.Recipe, setup: Setup) -> tuple[float, float, int]:
    """The first round's bytes down and up, the mean over clients, and the most parameters a client trains."""
    strategy = strategy_of(recipe, sorted(setup.clients))
    state = first_state(recipe, setup, strategy)
    setup.bench.load(setup.start)
    payloads = [strategy.brief(state, client) for client in sorted(setup.clients)]
    sizes = [_sizes(recipe, strategy, payload) for payload in payloads]
    down, up = (sum(way) / len(sizes) for way in zip(*sizes, strict=True))
    return down, up, max(_trained(payload) for payload in payloads)


def _sizes(recipe: r.Recipe, strategy: Strategy, payload: Payload) -> tuple[int, int]:
    """Bytes down to one client and up from it; of secure sums without the messages of the protocol."""
    form, hidden = recipe.federation.uplink, recipe.privacy.secure_aggregation
    down = len(pack(payload.adapter, payload.work.down, payload.residual, question=payload.question))
    sums = strategy.sums or (entrywise(payload.work.up) if hidden else None)
    if sums is None:
        return down, packed_size(travelling(payload.adapter, payload.work.up, payload.blocks), form)
    up, sent = 0, list[Named]()
    for trip in range(sums.trips):
        question = sums.ask(payload.adapter, sent) if trip else payload.question
        down += len(pack_question(question)) if trip else 0
        sent.append(sums.measure(trip, 1, question, payload.adapter, payload.adapter))
        numbers = sum(tensor.numel() for tensor in sent[-1].values())
        up += numbers * recipe.privacy.bits // 8 if hidden else packed_size(sent[-1], form)
    return down, up


def _trained(payload: Payload) -> int:
    """How many parameters a client trains: factors or cores, one scale per block of a core, tensors trained whole."""
    tensors = travelling(payload.adapter, payload.work.trains, payload.blocks)
    scales = [len(t) for name, t in tensors.items() if kind_of(name) == "core" and "scale" in payload.work.trains]
    return sum(t.numel() for t in tensors.values()) + sum(scales)


def peak_memory() -> int | None:
    """The largest resident size of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
