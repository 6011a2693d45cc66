"""The fixed-updates ablation: the clients' trained adapters held fixed, only the aggregator swapped.

One run of FedIT is followed; at the wanted rounds the very updates that its server got are given to every rule, and the
merged model is scored. Whatever differs then is the rule's doing: what the clients learnt is the same for all. What a
merge is worth is what can be learnt from it: where it is asked for, each rule goes on from its own merge for some
rounds, its clients with the same rows and seeds as all others', and is scored again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from florana.aggregate.error import measure
from florana.federation.journal import Journal
from florana.federation.loop import run_rounds
from florana.lora.factors import Contribution
from florana.recipe import schema as r
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import Setup
from florana.runs.setup import engine_of, federation_of, first_state, global_scores
from florana.strategy.base import PAIR, Outcome, State, Strategy
from florana.strategy.two_trips import seen
from florana.study.named_methods import Method

Held = Mapping[int, tuple[State, Sequence[Contribution]]]
"""Round -> the state that was broadcast at its start, and what the clients sent back, weighted."""


def hold(recipe: r.Recipe, setup: Setup, rounds: Sequence[int]) -> dict[int, tuple[State, Sequence[Contribution]]]:
    """Follow the recipe's own strategy, and keep what its server got at the wanted rounds."""
    captured: dict[int, tuple[State, Sequence[Contribution]]] = {}
    strategy = strategy_of(recipe, sorted(setup.clients))

    def watched(state: State, parts: Sequence[Contribution]) -> Outcome:
        if state.round + 1 in rounds:
            captured[state.round + 1] = (state, parts)
        return strategy.step(state, parts)

    _followed(recipe, setup, replace(strategy, step=watched), first_state(recipe, setup, strategy), max(rounds))
    return dict(sorted(captured.items()))


def _followed(recipe: r.Recipe, setup: Setup, strategy: Strategy, state: State, last: int) -> State:
    """The state after round `last`, from one after an earlier round; nothing is scored on the way."""
    plain = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"personal": "never"})})
    federation = replace(federation_of(plain, setup, sorted(setup.clients), setup.examples), rounds=last, evaluate=None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        journal = Journal(Path(folder), setup.bench.card)
        engine = engine_of(recipe, setup, first_state(recipe, setup, strategy), folder=Path(folder))
        return run_rounds(strategy, state, engine, federation, journal, lambda event: None)


def swap(
    recipe: r.Recipe, setup: Setup, methods: Sequence[Method], rounds: Sequence[int], rounds_on: int = 0
) -> list[dict[str, Any]]:
    """One row per round and rule: method, round, error, optimum, and the merged model's scores.

    Only rules that take whole pairs, trained from PEFT's start, can be given FedIT's clients; the others are left out.

    Args:
        recipe: FedIT's.
        setup: its model and rows.
        methods: the rules.
        rounds: whose updates are merged by every rule.
        rounds_on: for how many rounds each rule goes on from its own merge; the scores then stand under `on`.
    """
    return exchange(recipe, setup, methods, hold(recipe, setup, rounds), rounds_on=rounds_on)


def exchange(
    recipe: r.Recipe,
    setup: Setup,
    methods: Sequence[Method],
    held: Held,
    *,
    scored: Sequence[int] | None = None,
    rounds_on: int = 0,
) -> list[dict[str, Any]]:
    """Every rule on the same updates. `scored`: the rounds whose merged models are scored (None: all)."""
    rows: list[dict[str, Any]] = []
    for method in methods:
        ruled = recipe.model_copy(update={"strategy": dict(method.strategy)})
        one = strategy_of(ruled, sorted(setup.clients))
        if not all(_takes_pairs(one, before) for before, _ in held.values()):
            continue
        for round_, (before, parts) in held.items():
            own = one.init(before.adapter).memory  # what the rule itself would have kept: another one began the state
            after = one.step(replace(before, memory=own), seen(one, before, parts)).state
            error = measure(parts, after.adapter, after.residual)
            row = {"method": method.label, "round": round_, "error": error.error, "optimum": error.optimum}
            if scored is None or round_ in scored:
                row |= global_scores(setup, after.adapter, after.residual, recipe.evaluate.batch_size)
            if rounds_on:
                then = _followed(ruled, setup, one, after, round_ + rounds_on)
                row["on"] = dict(global_scores(setup, then.adapter, then.residual, recipe.evaluate.batch_size))
            rows.append(row)
    return rows


def _takes_pairs(strategy: Strategy, state: State) -> bool:
    payload = strategy.brief(state, "any")
    return payload.work == PAIR and strategy.begin == "lora" and strategy.facts.one_model
