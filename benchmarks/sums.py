"""How near the best adapter of rank r comes from two sums of sketches, round by round of a real run, by their width.

    python benchmarks/sums.py --recipe recipes/gsm8k-tiny-llama.toml --rounds 8

The run itself is `best-rank`'s. In each round its clients' updates are given to every width; a cell is the error over
the optimum of that rank, mean over the modules (largest). `numbers up` are those of FedIT.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from florana.aggregate.error import measure
from florana.federation.journal import Journal
from florana.federation.loop import run_rounds
from florana.lora.factors import Contribution
from florana.recipe.load import read_recipe
from florana.runs.prepared import prepare
from florana.runs.setup import engine_of, federation_of
from florana.strategy import STRATEGIES
from florana.strategy.base import Outcome, State, start
from florana.strategy.two_trips import seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/gsm8k-tiny-llama.toml"))
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    recipe = read_recipe(given.recipe)
    rank = recipe.model.rank
    widths = [rank, rank + rank // 4, rank + rank // 2, 2 * rank, 3 * rank]
    strategies = {f"k = {k / rank:g} r": STRATEGIES["best-rank"](source="sums", sketch=k) for k in widths}
    strategies["FedASK, k = 2 r"] = STRATEGIES["fedask"](sketch=2 * rank, trains="AB")
    plain = STRATEGIES["best-rank"]()
    ratios: dict[str, list[list[float]]] = {name: [] for name in [*strategies, "FedIT"]}

    def watched(state: State, parts: Sequence[Contribution]) -> Outcome:
        for name, strategy in strategies.items():
            found = measure(parts, strategy.step(state, seen(strategy, state, parts)).state.adapter)
            ratios[name].append([m.error / m.optimum for m in found.modules.values()])
        fedit = measure(parts, STRATEGIES["fedit"]().step(state, parts).state.adapter)
        ratios["FedIT"].append([m.error / m.optimum for m in fedit.modules.values()])
        return plain.step(state, parts)

    setup = prepare(recipe)
    state = start(setup.start)
    federation = federation_of(recipe, setup, sorted(setup.clients), setup.examples)
    fixed = dataclasses.replace(federation, rounds=given.rounds, evaluate=None, personal=lambda round_: False)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), setup.bench.card)
        followed = dataclasses.replace(plain, step=watched)
        run_rounds(followed, state, engine_of(recipe, setup, state), fixed, journal, lambda event: None)
    shown = sorted({1, 2, 3, given.rounds})
    print("| sums | numbers up | " + " | ".join(f"round {n}" for n in shown) + " |")
    print("|---" * (2 + len(shown)) + "|")
    for name, rounds in ratios.items():
        up = 1.0 if name == "FedIT" else float(name.split("= ")[1].removesuffix(" r"))
        cells = [f"{fmean(rounds[n - 1]):.3f} ({max(rounds[n - 1]):.2f})" for n in shown]
        print(f"| {name} | {up:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
