"""What quantized uplinks cost on real training: float32, bfloat16, int8, with error feedback and without.

    python benchmarks/uplink.py [--seeds 3] [--recipe recipes/study-small.toml]

For `fedit`, whose factors continue from round to round, feedback is the rule, and the control leaves it out. For
`best-rank`, which choose the factors anew, no feedback is the rule, and the control carries the remainders over all the
same. Both controls exist here only. One line per run: method, format, feedback, seed, the global model's figures, the
mean error of the uplink and of the aggregation over the rounds, bytes up of the whole run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from florana.federation.quantize import Format
from florana.recipe.load import read_recipe
from florana.recipe.schema import Recipe
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import Setup, prepare
from florana.runs.rounds import Result, execute_rounds
from florana.runs.setup import begin, engine_of, federation_of

RUNS: list[tuple[str, Format, Literal["stay", "move"]]] = [
    ("fedit", "float32", "stay"),
    ("fedit", "bfloat16", "stay"),
    ("fedit", "bfloat16", "move"),
    ("fedit", "int8", "stay"),
    ("fedit", "int8", "move"),
    ("best-rank", "float32", "move"),
    ("best-rank", "int8", "move"),
    ("best-rank", "int8", "stay"),
]


def run(recipe: Recipe, setup: Setup, coordinates: Literal["stay", "move"], folder: Path) -> Result:
    """As `florana.runs.setup.execute`, with the strategy's word on its coordinates replaced."""
    plain = strategy_of(recipe, sorted(setup.clients))
    strategy = replace(plain, facts=replace(plain.facts, coordinates=coordinates))
    begun = strategy.init(begin(recipe, setup, strategy))
    return execute_rounds(
        recipe,
        folder,
        strategy,
        begun,
        setup.bench.card,
        lambda memories: engine_of(recipe, setup, begun, memories),
        federation_of(recipe, setup, sorted(setup.clients), setup.examples),
        lambda: {},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/study-small.toml"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | uplink | feedback | seed | accuracy | loss | uplink error | aggregation error | MB up |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for seed in range(asked.seeds):
        base = read_recipe(asked.recipe, [f"seed={seed}", "evaluate.personal=never", "evaluate.every=10"])
        setup = prepare(base)
        for method, form, coordinates in RUNS:
            recipe = base.model_copy(
                update={
                    "strategy": {"name": method},
                    "federation": base.federation.model_copy(update={"uplink": form}),
                }
            )
            with tempfile.TemporaryDirectory() as folder:
                records = run(recipe, setup, coordinates, Path(folder) / "run").records
            last = records[-1].eval["global"]
            missed = statistics.fmean(record.error.get("uplink") or 0.0 for record in records)
            error = statistics.fmean(record.error["overall"] for record in records)
            carried = "-" if form == "float32" else {"stay": "yes", "move": "no"}[coordinates]
            up = sum(record.bytes_up for record in records) / 1e6
            print(
                f"| {method} | {form} | {carried} | {seed} | {last['accuracy']:.4f} | {last['loss']:.4f} "
                f"| {missed:.2e} | {error:.4f} | {up:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
