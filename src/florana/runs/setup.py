"""The only joiner: a recipe becomes a model, data, clients, a strategy and an engine; the result is a run folder.

RUN/recipe.toml   resolved, runs again              RUN/environment.json        versions, hardware, threads, seed
RUN/setup.json    who holds what, the start's score RUN/rounds.jsonl            one line per committed round
RUN/adapter/      the global adapter, for PEFT      RUN/checkpoint/, RUN/log.txt
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from florana.federation.best import enough
from florana.federation.local_engine import Fit, LocalEngine
from florana.federation.side_by_side import require_forks, side_by_side
from florana.federation.terms import Federation
from florana.federation.weighting import Weighing, by_examples, uniformly
from florana.lora.factors import Adapter
from florana.recipe import schema as r
from florana.runs.chosen_strategy import strategy_of
from florana.runs.completions import write_completions
from florana.runs.noisy_sums import multipliers, noising_of
from florana.runs.prepared import Setup, prepare
from florana.runs.private_runs import mechanisms, private_here, require_private
from florana.runs.rounds import Result, Show, execute_rounds, settled
from florana.runs.run_folder import check_folder
from florana.runs.sealed_clients import sealed_here, sealing_of
from florana.strategy.base import State, Strategy
from florana.train import lora_init
from florana.train.client import TrainingClients, steps_per_round
from florana.train.cohort_engine import in_cohorts
from florana.train.evaluate import evaluate
from florana.train.optimizer import reach
from florana.train.private_clients import Watched, unwatched
from florana.train.start_from import require_begun

WEIGHTINGS = {"examples": by_examples, "uniform": uniformly}


def execute(
    recipe: r.Recipe,
    folder: Path | str,
    *,
    setup: Setup | None = None,
    resume: bool = False,
    show: Show = lambda event: None,
    step: Callable[[str], None] = lambda client: None,
    until: int | None = None,
) -> Result:
    """Run a recipe into a folder, or continue the run that the folder holds, with the number of threads it began with.

    Args:
        recipe: the recipe of the run.
        folder: the run folder.
        setup: a `prepare`d set-up to use; it must come from a recipe that differs in the strategy at most.
        resume: continue; a folder without a committed round starts anew. Without it the folder must not exist.
        show: told of rounds, replies, rejected updates and commits.
        step: told of every optimizer step.
        until: stop after this round, as a kill would; None goes on to the recipe's last.

    Raises:
        RecipeError: the folder is taken, or was made by another recipe.
        InputError: model or data unusable.
        FederationError: too few usable updates, or the disk refused; the rounds committed before stand.
    """
    folder = Path(folder)
    check_folder(recipe, folder, resume)
    with settled(recipe, folder, show) as recipe:
        here = setup or prepare(recipe)
        noising = noising_of(recipe, sorted(here.clients), folder, simulated=True)
        multipliers(recipe, here.examples)  # a budget that no noise reaches is said before anything is written
        strategy = strategy_of(recipe, sorted(here.clients))
        begun = first_state(recipe, here, strategy)
        keep = functools.partial(write_completions, folder)
        whole = federation_of(recipe, here, sorted(here.clients), here.examples, keep)
        return execute_rounds(
            recipe,
            folder,
            strategy,
            begun,
            here.bench.card,
            lambda memories: engine_of(recipe, here, begun, memories, step, folder),
            replace(whole, rounds=min(until or whole.rounds, whole.rounds), noising=noising),
            lambda: facts_of(recipe, here, here.partition) | ({"noise": "seed"} if recipe.privacy.unit else {}),
            show,
            here.partition.get("labels", ()),
            here.bench.tokenizer,
        )


def engine_of(
    recipe: r.Recipe,
    setup: Setup,
    begun: State,
    memories: Mapping[str, Mapping[str, Tensor]] | None = None,
    step: Callable[[str], None] = lambda client: None,
    folder: Path = Path(),
    watched: Watched = unwatched,
) -> LocalEngine:
    """The clients of a set-up in the local engine; all know `begun`, the first state. Of a recipe with a privacy budget
    the folder is where the ledger lies, and `watched` is told of each update."""
    workers, clients = recipe.engine.workers, clients_of(recipe, setup, begun, step)
    sealed, spends = sealed_here(recipe, setup.examples, folder), mechanisms(recipe, setup.examples)
    if spends:
        require_private(recipe, setup.bench, folder)

    def fit_with(told: Callable[[str], None]) -> Fit:
        plain = clients_of(recipe, setup, begun, told)
        return private_here(recipe, plain, spends, folder, watched).fit if spends else plain.fit

    if workers == 1:
        each = in_cohorts(clients, recipe.engine.cohort, recipe.model.base)
        return LocalEngine(fit_with(step), memories, each, sealed)

    require_forks()
    return LocalEngine(fit_with(step), memories, functools.partial(side_by_side, workers, fit_with, step), sealed)


def clients_of(
    recipe: r.Recipe, setup: Setup, begun: State, step: Callable[[str], None] = lambda client: None
) -> TrainingClients:
    """The clients of a set-up at its bench, ready to train."""
    return TrainingClients(
        setup.bench,
        Adapter(begun.adapter.modules, setup.head, begun.adapter.cores),
        setup.clients,
        setup.common[: recipe.evaluate.personal_limit],
        recipe.train,
        recipe.evaluate,
        "personal" if recipe.model.personal else "average",
        recipe.federation.rounds,
        step,
        recipe.build_strategy().sums,
        recipe.privacy.clip if recipe.privacy.unit == "clients" else None,
    )


def begin(recipe: r.Recipe, setup: Setup, strategy: Strategy) -> Adapter:
    """What the strategy's first state is made from: PEFT's start, or factors from the base weights or their
    gradient."""
    if strategy.begin == "principal":
        return lora_init.principal(setup.bench, setup.start)
    if strategy.begin == "gradient":
        batches = {client: data.train[: recipe.train.batch_size] for client, data in setup.clients.items()}
        return lora_init.gradient(setup.bench, setup.start, batches, recipe.train.learning_rate)
    return setup.start


def first_state(recipe: r.Recipe, setup: Setup, strategy: Strategy) -> State:
    """The strategy's state before the first round. Raises RecipeError where it cannot start from `model.adapter`."""
    begun = strategy.init(begin(recipe, setup, strategy))
    if recipe.model.adapter is not None:
        require_begun(strategy, begun, setup.start)
    return begun


def global_scores(setup: Setup, adapter: Adapter, residual: Adapter | None, batch_size: int) -> dict[str, float]:
    """The scores of a server state on the common test set."""
    setup.bench.load(adapter, residual)
    scores = evaluate(setup.bench, setup.common, batch_size)
    for ending, rows in setup.more.items():
        scores |= {f"{name}_{ending}": value for name, value in evaluate(setup.bench, rows, batch_size).items()}
    return scores


def federation_of(
    recipe: r.Recipe,
    setup: Setup | None,
    clients: Sequence[str],
    examples: Mapping[str, int],
    keep: Callable[[int, Sequence[Mapping[str, Any]]], None] = lambda round_, completions: None,
) -> Federation:
    """The fixed facts of a recipe's run, for the round loop.

    Args:
        recipe: the run's.
        setup: its model and data; None at a server that has no base model, where nothing is measured.
        clients: their names.
        examples: client -> its rows; of clients without an entry any count is believed.
        keep: given the round and what the global model wrote, where the recipe has it write.
    """
    rounds, every = recipe.federation.rounds, recipe.evaluate.every

    def asked(round_: int) -> bool:
        return setup is not None and setup.benchmark is not None and setup.benchmark.due(round_, rounds)

    def scores(state: State) -> Mapping[str, float]:
        assert setup is not None
        figures = global_scores(setup, state.adapter, state.residual, recipe.evaluate.batch_size)
        # global_scores has left the state's model on the bench
        if setup.benchmark is None or not asked(state.round):
            return figures
        return figures | setup.benchmark.run(setup.bench, functools.partial(keep, state.round))

    def validation(state: State) -> Mapping[str, float]:
        assert setup is not None
        setup.bench.load(state.adapter, state.residual)
        return evaluate(setup.bench, setup.validation, recipe.evaluate.batch_size)

    often = {"never": None, "last": rounds, "every": every}[recipe.evaluate.personal]
    return Federation(
        clients=sorted(clients),
        rounds=rounds,
        per_round=recipe.federation.clients_per_round or len(clients),
        seed=recipe.seed,
        weighing=Weighing(
            WEIGHTINGS[recipe.federation.weighting],
            recipe.federation.max_weight,
            recipe.robust.build(),
            recipe.robust.rule,
        ),
        # A personal head leaves the server without one, so there is no global model to measure.
        evaluate=None if recipe.model.personal or setup is None or not setup.common else scores,
        validate=None if recipe.model.personal or setup is None or not setup.validation else validation,
        measured=lambda round_: round_ % every == 0 or round_ == rounds or asked(round_),
        personal=lambda round_: often is not None and (round_ % often == 0 or round_ == rounds),
        minimum=recipe.federation.min_clients,
        examples=examples,
        uplink=recipe.federation.uplink,
        max_change=recipe.federation.max_change,
        enough=lambda records: enough(records, recipe.evaluate.by, recipe.evaluate.patience),
        reach=lambda rows: reach(recipe.train, steps_per_round(recipe.train, rows)),
        sealing=sealing_of(recipe),
    )


def facts_of(recipe: r.Recipe, setup: Setup, partition: Mapping[str, Any]) -> dict[str, Any]:
    """What setup.json says: who holds what, the starting model's scores, sizes."""
    measured = not recipe.model.personal and setup.common
    return {
        **partition,
        "start": global_scores(setup, setup.start, None, recipe.evaluate.batch_size) if measured else None,
        "trainable_parameters": setup.start.parameters,
        "base_parameters": setup.bench.base_parameters,
        "common_test": len(setup.common),
        "validation": len(setup.validation),
    }
