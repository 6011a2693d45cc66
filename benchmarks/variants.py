"""What gauge, memory and a wider broadcast do over rounds, on the demo's task: final accuracy over seeds.

    python benchmarks/variants.py [--seeds 5] [--rounds 10] [--alpha 0.1] [--all]

Every variant of `best-rank` (and its neighbours) trains on the same partitions, first adapters and client seeds; a seed
gives another partition, start and order. Printed: final accuracy on the common test set, mean and 95 % interval over
seeds, the paired difference from plain `best-rank` with its interval, the mean aggregation error over rounds, and the
numbers sent. `--all` runs every other method too, at the same learning rate: that shows that they train, and ranks
nothing, since methods that train one factor need another rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from florana.demo.demo import demo_recipe
from florana.recipe.load import check
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.strategy import STRATEGIES

VARIANTS: list[dict[str, Any]] = [
    {"name": "best-rank"},
    {"name": "best-rank", "factorization": "orthonormal"},
    {"name": "best-rank", "factorization": "aligned"},
    {"name": "best-rank", "carry_rank": 8},
    {"name": "best-rank", "carry_rank": 48},
    {"name": "best-rank", "broadcast_rank": 16},
    {"name": "best-rank", "broadcast_rank": 32},
    {"name": "best-rank", "broadcast_error": 0.05},
    {"name": "best-rank", "factorization": "aligned", "carry_rank": 48},
    {"name": "fedit"},
    {"name": "flora-na"},
    {"name": "oracle"},
]


def label(options: dict[str, Any]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in options.items() if key != "name")
    return options["name"] + (f" ({rest})" if rest else "")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return values[0], float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    named = {options["name"] for options in VARIANTS}
    variants = VARIANTS + ([{"name": name} for name in STRATEGIES if name not in named] if arguments.all else [])
    found: dict[str, list[dict[str, float]]] = {label(options): [] for options in variants}
    for seed in range(arguments.seeds):
        table = demo_recipe("fedit", arguments.rounds, seed).model_dump(exclude_none=True)
        table["partition"] |= {"alpha": arguments.alpha, "smallest": 10}
        table["evaluate"] |= {"every": arguments.rounds, "personal": "never"}
        setup = prepare(check(table, "variants"))
        for options in variants:
            with tempfile.TemporaryDirectory() as folder:
                run = execute(check({**table, "strategy": options}, "variants"), Path(folder) / "run", setup=setup)
            last = run.records[-1]
            found[label(options)].append(
                {
                    "accuracy": last.eval.get("global", {}).get("accuracy", float("nan")),
                    "loss": last.eval.get("global", {}).get("loss", float("nan")),
                    "error": statistics.mean(r.error["overall"] or 0.0 for r in run.records),
                    "up": sum(r.bytes_up for r in run.records) / 1e6,
                    "down": sum(r.bytes_down for r in run.records) / 1e6,
                }
            )
            print(f"seed {seed}  {label(options):44} {found[label(options)][-1]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    reference = [run["accuracy"] for run in found["best-rank"]]
    print(f"\n{arguments.rounds} rounds, Dirichlet {arguments.alpha}, {arguments.seeds} seeds, one thread")
    print(f"{'':44} {'accuracy':>16} {'minus best-rank':>18} {'loss':>7} {'error':>7} {'up MB':>7} {'down MB':>8}")
    for name, runs in found.items():
        mean, half = interval([run["accuracy"] for run in runs])
        gain, spread = interval([run["accuracy"] - r for run, r in zip(runs, reference, strict=True)])
        figures = [statistics.mean(run[key] for run in runs) for key in ("loss", "error", "up", "down")]
        print(
            f"{name:44} {mean:.4f} +- {half:.4f} {gain:+.4f} +- {spread:.4f} "
            f"{figures[0]:7.3f} {figures[1]:7.4f} {figures[2]:7.1f} {figures[3]:8.1f}"
        )


if __name__ == "__main__":
    main()
