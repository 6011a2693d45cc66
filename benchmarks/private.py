"""What an epsilon costs: accuracy of four methods under DP-SGD at the clients, at epsilon 1, 3, 8 and without noise.

    python benchmarks/private.py OUT.jsonl [--task docstrings|sst2] [--seeds 5]

docstrings  topics of docstrings, a tiny encoder, some 1,050 rows at each client, 8 rounds of 3 steps of 128, delta 1e-4
sst2        film reviews with MiniLM (all of SST-2's 67,349 rows), 6 rounds of 3 steps of 64, delta 1e-5

Four clients, Dirichlet 1.0, clip 1, AdamW. The learning rate of each method and epsilon is the one of two that is best
on validation rows at a seed of its own (100), never on the test set. Lines that OUT has are not run again. Without
noise: the same steps with clipping alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from florana.recipe.load import read_recipe
from florana.runs.prepared import Setup, prepare
from florana.runs.setup import execute

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
METHODS = {
    "ffa-lora": [],
    "fedsvd": [],
    "fedask": [],
    "best-rank": ["strategy.source=sums"],
}
EPSILONS = (1.0, 3.0, 8.0, math.inf)
TUNED_ON = 100


@dataclass(frozen=True)
class Task:
    """A recipe, what is put over it, and the learning rates that are tried."""

    recipe: str
    settings: tuple[str, ...]
    rates: tuple[float, float]


TASKS = {
    "docstrings": Task(
        "private-docstrings.toml",
        ("partition.clients=4", "federation.rounds=8", "train.steps=3", "train.batch_size=128", "evaluate.every=8"),
        (1e-2, 3e-2),
    ),
    "sst2": Task("private-sst2.toml", (), (5e-3, 1e-2)),
}


def settings_of(task: Task, method: str, epsilon: float, rate: float, seed: int) -> list[str]:
    """What is put over the recipe."""
    budget = [f"privacy.epsilon={epsilon}"]
    if math.isinf(epsilon):
        budget = ["privacy.epsilon=1e15", "privacy.noise_multiplier=1e-6"]
    own = [f"strategy.name={method}", *METHODS[method]]
    return [*task.settings, *own, *budget, f"train.learning_rate={rate}", f"seed={seed}", "threads=1"]


def measured(
    task: Task, setups: dict[int, Setup], method: str, epsilon: float, rate: float, seed: int
) -> dict[str, float]:
    """Accuracy on the test and the validation rows after the last round."""
    recipe = read_recipe(RECIPES / task.recipe, settings_of(task, method, epsilon, rate, seed))
    if seed not in setups:
        setups[seed] = prepare(recipe)
    with tempfile.TemporaryDirectory() as folder:
        last = execute(recipe, Path(folder) / "run", setup=setups[seed]).records[-1]
    return {name: last.eval[name]["accuracy"] for name in ("global", "validation")}


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=sorted(TASKS), default="docstrings")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    task = TASKS[given.task]
    setups: dict[int, Setup] = {}
    done: dict[str, dict[str, Any]] = {}
    if given.out.exists():
        done = {row["cell"]: row for row in map(json.loads, given.out.read_text().splitlines())}

    def run(method: str, epsilon: float, rate: float, seed: int) -> dict[str, Any]:
        cell = f"{method} {epsilon} {rate} {seed}"
        if cell not in done:
            done[cell] = {"cell": cell, **measured(task, setups, method, epsilon, rate, seed)}
            with given.out.open("a") as stream:
                stream.write(json.dumps(done[cell]) + "\n")
        return done[cell]

    best: dict[tuple[str, float], float] = {}
    for epsilon in reversed(EPSILONS):
        for method in METHODS:
            scores = {rate: run(method, epsilon, rate, TUNED_ON)["validation"] for rate in task.rates}
            best[method, epsilon] = max(task.rates, key=lambda rate: (scores[rate], -rate))
    for seed in range(given.seeds):
        for method, epsilon in best:
            run(method, epsilon, best[method, epsilon], seed)
    print("| method | " + " | ".join("no noise" if math.isinf(e) else f"epsilon {e:g}" for e in EPSILONS) + " |")
    print("|---" * (len(EPSILONS) + 1) + "|")
    for method in METHODS:
        cells = []
        for epsilon in EPSILONS:
            rate = best[method, epsilon]
            values = [run(method, epsilon, rate, seed)["global"] for seed in range(given.seeds)]
            half = 0.0
            if len(values) > 1:
                half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
            cells.append(f"{statistics.mean(values):.3f} ± {half:.3f} ({rate:g})")
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
