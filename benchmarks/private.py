"""What an epsilon costs: accuracy of four methods under DP-SGD at the clients, at epsilon 1, 3, 8 and without noise.

    python benchmarks/private.py OUT.jsonl [--task docstrings|sst2] [--seeds 5] [--jobs 2]

docstrings  topics of docstrings, a tiny encoder, some 1,050 rows at each client, 8 rounds of 3 steps of 128, delta 1e-4
sst2        film reviews with MiniLM, its last layer (all of SST-2's 67,349 rows), 6 rounds of 3 steps of 64, delta 1e-5

Four clients, Dirichlet 1.0, clip 1, AdamW. The learning rate of each method and epsilon is the best of two or three on
validation rows at a seed of its own (100), never on the test set. Lines that OUT has are not run again. Without
noise: the same steps with clipping alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
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
    rates: tuple[float, ...]


Cell = tuple[str, float, float, int]
"""Method, epsilon, learning rate, seed."""


def named(cell: Cell) -> str:
    """As the file of results calls it."""
    return " ".join(map(str, cell))


TASKS = {
    "docstrings": Task(
        "private-docstrings.toml",
        ("partition.clients=4", "federation.rounds=8", "train.steps=3", "train.batch_size=128", "evaluate.every=8"),
        (1e-2, 3e-2),
    ),
    "sst2": Task("private-sst2.toml", (), (1e-2, 3e-2, 1e-1)),
}


def settings_of(task: Task, method: str, epsilon: float, rate: float, seed: int) -> list[str]:
    """What is put over the recipe."""
    budget = [f"privacy.epsilon={epsilon}"]
    if math.isinf(epsilon):
        budget = ["privacy.epsilon=1e15", "privacy.noise_multiplier=1e-6"]
    own = [f"strategy.name={method}", *METHODS[method]]
    return [*task.settings, *own, *budget, f"train.learning_rate={rate}", f"seed={seed}", "threads=1"]


@cache
def prepared(task: str, seed: int) -> Setup:
    """Model and rows, which all cells of a seed share."""
    return prepare(read_recipe(RECIPES / TASKS[task].recipe, settings_of(TASKS[task], "ffa-lora", 8.0, 1e-2, seed)))


def measured(task: str, cell: Cell) -> dict[str, Any]:
    """Accuracy on the test and the validation rows after the last round."""
    recipe = read_recipe(RECIPES / TASKS[task].recipe, settings_of(TASKS[task], *cell))
    with tempfile.TemporaryDirectory() as folder:
        last = execute(recipe, Path(folder) / "run", setup=prepared(task, cell[-1])).records[-1]
    scores = {name: last.eval[name]["accuracy"] for name in ("global", "validation")}
    return {"cell": named(cell), **scores}


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=sorted(TASKS), default="docstrings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, of one thread each")
    given = parser.parse_args()
    rates = TASKS[given.task].rates
    done: dict[str, dict[str, Any]] = {}
    if given.out.exists():
        done = {row["cell"]: row for row in map(json.loads, given.out.read_text().splitlines())}

    def run(cells: Iterable[Cell]) -> None:
        todo = [cell for cell in cells if named(cell) not in done]
        with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for ended in as_completed([pool.submit(measured, given.task, cell) for cell in todo]):
                row = ended.result()
                done[row["cell"]] = row
                with given.out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")

    def score(method: str, epsilon: float, rate: float, seed: int, rows: str) -> float:
        return float(done[named((method, epsilon, rate, seed))][rows])

    pairs = [(method, epsilon) for epsilon in reversed(EPSILONS) for method in METHODS]
    run((*pair, rate, TUNED_ON) for pair in pairs for rate in rates)
    best = {pair: max(rates, key=lambda rate: (score(*pair, rate, TUNED_ON, "validation"), -rate)) for pair in pairs}
    run((*pair, best[pair], seed) for seed in range(given.seeds) for pair in pairs)
    print("| method | " + " | ".join("no noise" if math.isinf(e) else f"epsilon {e:g}" for e in EPSILONS) + " |")
    print("|---" * (len(EPSILONS) + 1) + "|")
    for method in METHODS:
        cells = []
        for epsilon in EPSILONS:
            rate = best[method, epsilon]
            values = [score(method, epsilon, rate, seed, "global") for seed in range(given.seeds)]
            half = 0.0
            if len(values) > 1:
                half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
            cells.append(f"{statistics.mean(values):.3f} ± {half:.3f} ({rate:g})")
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
