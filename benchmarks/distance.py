"""How far each rule is from the exact average on the adapters of real clients, one thing varied at a time.

    python benchmarks/distance.py sst2 [--seeds 3] [--rounds 1,3] [--vary alpha,rank] [--score]    or mrpc, gsm8k ...

Clients train from a shared start under FedIT; at the wanted rounds the very updates its server got are given to every
rule (`florana.study.fixed_updates`), so that nothing but the rule differs. Printed as Markdown: the relative
aggregation error over all modules, mean ± half the 95 % interval over seeds (Student's t), and how much of the way
from FedIT to the best adapter of that rank FLoRA-NA goes, each seed by itself. A seed gives a partition, a start and
an order.

The base point is followed for `--rounds`; `--score` also scores its merged models there, on the recipe's test rows;
`--rules FILE.py:FUNCTION,...` scores further rules; `--out ROWS.json` keeps all rows, for `benchmarks/findings.py`.
Learning rates are the recipes'; as rank varies, alpha / rank stays.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from florana.recipe.load import read_recipe
from florana.runs.prepared import prepare
from florana.study.estimates import estimate
from florana.study.fixed_updates import exchange, hold
from florana.study.named_methods import method_of, split_methods

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RULES = {
    "FedIT": "fedit",
    "factors, module": "flora-na",
    "factors, model": "flora-na[scope=model]",
    "updates, module": "flora-na[combine=updates]",
    "updates, model": "flora-na[combine=updates,scope=model]",
    "best of rank r": "best-rank",
}
"""Column -> method; the four in the middle are FLoRA-NA."""


@dataclass(frozen=True)
class Source:
    """A recipe, what is changed in it for the base point, and what else is tried: factor -> value -> changes."""

    recipe: str
    base: Sequence[str]
    varied: Mapping[str, Mapping[str, Sequence[str]]]


def sizes(steps: Sequence[int], ranks: Sequence[int], clients: Sequence[int]) -> dict[str, dict[str, list[str]]]:
    return {
        "local steps": {str(n): [f"train.steps={n}"] for n in steps},
        "rank": {str(n): [f"model.rank={n}", f"model.alpha={2 * n}"] for n in ranks},
        "clients": {str(n): [f"partition.clients={n}"] for n in clients},
    }


CLASSES = {
    "alpha": {str(a): [f"partition.alpha={a}"] for a in (0.1, 10)},
    **sizes(steps=(2, 20), ranks=(2, 16), clients=(3, 12)),
}
BY_LENGTH, IID = {"by length": ["partition.kind=length"]}, {"iid": ["partition.kind=iid"]}
CUT = ["train.batch_size=8", "train.steps=5", "partition.clients=6", "partition.smallest=12", "data.train_limit=3000",
       "data.test_limit=200"]  # fmt: skip
TINY = ["data.train_limit=1500"]
SOURCES = {
    "sst2": Source("sst2-minilm.toml", CUT, CLASSES),
    "mrpc": Source("mrpc-minilm.toml", CUT, CLASSES),
    "gsm8k": Source("gsm8k-tiny-llama.toml", TINY, {"partition": IID, **sizes((2, 20), (2, 16), (3, 12))}),
    "docstrings": Source("study-findings.toml", [], {"alpha": CLASSES["alpha"]}),
    "mbpp": Source("mbpp-tiny-llama.toml", [], {"partition": BY_LENGTH, **sizes((2, 20), (2, 16), (2, 8))}),
}


def rows_of(
    source: Source, factor: str, value: str, seed: int, followed: Sequence[int], scored: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Every rule at one point of the grid: at all rounds `followed` of the base point, at the first of the others.

    `scored`: further rules at the base point, all of them scored there; None scores nothing.
    """
    rounds = followed if not factor else followed[:1]
    changes = [*source.base, *(source.varied[factor][value] if factor else []), f"seed={seed}"]
    recipe = read_recipe(RECIPES / source.recipe, [*changes, "strategy.name=fedit", f"federation.rounds={max(rounds)}"])
    recipe = recipe.model_copy(update={"generation": None})
    setup = prepare(recipe)
    score = scored is not None and not factor
    methods = [method_of(name) for name in [*RULES.values(), *((scored or ()) if score else ())]]
    rows = exchange(recipe, setup, methods, hold(recipe, setup, rounds), scored=rounds if score else ())
    return [{"factor": factor, "value": value, "seed": seed, **row} for row in rows]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per point of the grid."""
    heads = ["varied", *RULES, "closed by factors, module", "closed by updates, module"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for factor, value, round_ in dict.fromkeys((row["factor"], row["value"], row["round"]) for row in rows):
        own = [row for row in rows if (row["factor"], row["value"], row["round"]) == (factor, value, round_)]
        found = {label: {r["seed"]: r["error"] for r in own if r["method"] == method_of(name).label}
                 for label, name in RULES.items()}  # fmt: skip
        what = f"{factor} {value}" if factor else f"base point, round {round_}"
        cells = [text([errors[seed] for seed in errors], 3) for errors in found.values()]
        for label in ("factors, module", "updates, module"):
            fedit, best = found["FedIT"], found["best of rank r"]
            cells.append(text([100 * (fedit[s] - found[label][s]) / (fedit[s] - best[s]) for s in fedit], 0) + " %")
        lines.append("| " + " | ".join([what, *cells]) + " |")
    return "\n".join(lines)


def text(values: Sequence[float], digits: int) -> str:
    found = estimate(values)
    if found is None:
        return "-"
    half = "" if found.half is None else f" ± {found.half:.{digits}f}"
    return f"{found.mean:.{digits}f}{half}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", default="1,3", help="of the base point, by commas")
    parser.add_argument("--vary", help="factors, by commas; all where it is left out, none where it is empty")
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--rules", default="", help="with --score: FILE.py:FUNCTION and methods, by commas")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    source = SOURCES[arguments.source]
    factors = list(source.varied) if arguments.vary is None else [f for f in arguments.vary.split(",") if f]
    further = ["oracle", *split_methods(arguments.rules)] if arguments.score else None
    followed = [int(round_) for round_ in arguments.rounds.split(",")]
    unknown = [factor for factor in factors if factor not in source.varied]
    if unknown:
        raise SystemExit(f"{arguments.source} has no factor {unknown[0]!r}: there are {', '.join(source.varied)}")
    points = [("", ""), *((factor, value) for factor in factors for value in source.varied[factor])]
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for factor, value in points:
            rows += rows_of(source, factor, value, seed, followed, further)
            print(f"seed {seed}  {factor or 'base point'} {value}", flush=True)
    order = {point: index for index, point in enumerate(points)}
    rows.sort(key=lambda row: (order[row["factor"], row["value"]], row["round"]))
    if arguments.out:
        arguments.out.write_text(json.dumps({"source": arguments.source, "rows": rows}, indent=1) + "\n")
    print(f"\n{arguments.source}: recipes/{source.recipe} with {', '.join(source.base) or 'nothing changed'};")
    print(f"round {followed[0]} unless said otherwise\n\n" + table(rows) + f"\n\n{arguments.seeds} seeds")


if __name__ == "__main__":
    main()
