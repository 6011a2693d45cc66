"""How different honest clients' changes are: the largest, as a multiple of the round's median, kind by kind.

    python benchmarks/changes.py [--rounds 10] [--seeds 2] [--out changes.json]

The figures behind `federation.max_change`: docstring topics and the demo's encoder (recipes/study-findings.toml),
Dirichlet 0.1 and 0.5, equal steps and one or three passes over unequal rows, every strategy, heads averaged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from florana.federation import loop
from florana.lora.factors import Update
from florana.recipe.load import check, read_recipe
from florana.recipe.schema import Recipe
from florana.robust.changes import sizes
from florana.runs.setup import execute
from florana.strategy import STRATEGIES
from florana.strategy.base import Payload

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "study-findings.toml"
SMALL: Mapping[str, Mapping[str, Any]] = {"ravan": {"heads": 2, "size": 8}}
LENGTHS = {"8 steps": {"steps": 8}, "1 epoch": {"epochs": 1}, "3 epochs": {"epochs": 3}}


def observed(recipe: Recipe) -> list[dict[str, list[float]]]:
    """Round by round: kind -> every client's change."""
    rounds: list[dict[str, list[float]]] = []
    before = loop.oversized

    def watched(updates: Sequence[Update], sent: Mapping[str, Payload], factor: float) -> dict[str, str]:
        del factor
        found = [sizes((u.adapter, sent[u.client].adapter), sent[u.client].work.up) for u in updates]
        rounds.append({kind: [client[kind] for client in found] for kind in found[0]})
        return {}

    loop.oversized = watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            execute(recipe, Path(folder) / "run")
    finally:
        loop.oversized = before
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--lengths", nargs="*", default=[*LENGTHS], choices=[*LENGTHS])
    parser.add_argument("--strategies", nargs="*", default=[*STRATEGIES])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    plain = read_recipe(RECIPE).model_dump(exclude_none=True)
    plain.pop("study")
    rows = []
    for name in options.strategies:
        for alpha in (0.1, 0.5):
            for length, train in ((name, LENGTHS[name]) for name in options.lengths):
                for seed in range(options.seeds):
                    table = plain | {
                        "seed": seed,
                        "strategy": {"name": name, **SMALL.get(name, {})},
                        "train": {"batch_size": 16, "learning_rate": 5e-3, **train},
                        "partition": plain["partition"] | {"alpha": alpha, "clients": options.clients},
                        "federation": plain["federation"] | {"rounds": options.rounds},
                        "evaluate": {"every": 100, "personal": "never"},
                        "data": plain["data"] | {"test_limit": 20, "train_limit": 600},
                    }
                    rounds = observed(check(table, "changes"))
                    kinds = {
                        kind: [max(r[kind]) / m for r in rounds if (m := statistics.median_low(r[kind])) > 0]
                        for kind in rounds[0]
                    }
                    worst = {kind: max(values) for kind, values in kinds.items() if values}
                    row = {"strategy": name, "alpha": alpha, "train": length, "seed": seed, "largest": worst}
                    rows.append(row)
                    shown = "  ".join(f"{kind} {value:5.2f}" for kind, value in worst.items())
                    print(f"{name:12} alpha {alpha}  {length:9} seed {seed}  {shown}", flush=True)
                    if options.out is not None:
                        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
