"""`florana demo`: four strategies on the same clients, real text, real pretrained weights, offline.

The docstrings of the installed Python standard library, sorted into ten topics, are split over six clients by a
Dirichlet distribution over the topics; an encoder of 0.7 million parameters that comes with florana (see
scripts/pretrain_tiny_encoder.py) learns with LoRA to tell the topic. Held-out docstrings, which neither the pretraining
nor the clients saw, are the common test set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.report.page import write_report
from florana.runs.prepared import Setup, prepare
from florana.runs.rounds import Result, Show
from florana.runs.setup import execute

STRATEGIES = ("fedit", "flora-na", "best-rank", "oracle")
CLIENTS, ROUNDS, STEPS = 6, 7, 8  # chosen for the clock: under 90 seconds on two cores


def demo_recipe(strategy: str, rounds: int = ROUNDS, seed: int = 0) -> Recipe:
    """The demonstration's recipe; it runs as a TOML file too (see OUT/<strategy>/recipe.toml)."""
    return check(
        {
            "title": "florana demo: topics of the Python standard library",
            "seed": seed,
            "task": "sequence-classification",
            "model": {
                "base": "package:florana/demo/tiny-encoder",
                "target_modules": "all-linear",
                "rank": 8,
                "alpha": 16,
            },
            "data": {
                "train": "stdlib-docstrings",
                "text": "text",
                "label": "topic",
                "max_length": 32,
                "test_limit": 600,
            },
            "partition": {"kind": "dirichlet", "clients": CLIENTS, "alpha": 0.3, "smallest": 20},
            "train": {"steps": STEPS, "batch_size": 16, "learning_rate": 5e-3},
            "federation": {"rounds": rounds},
            "strategy": {"name": strategy},
            "evaluate": {"every": 2, "personal": "last", "personal_limit": 200},
        },
        "the demo's recipe",
    )


def run_demo(
    out: Path,
    rounds: int,
    show: Callable[[str], Show],
    step: Callable[[str], None],
    strategies: Sequence[str] = STRATEGIES,
) -> tuple[list[Result], Path]:
    """Run every strategy into a folder below `out` and write `out/report.html`.

    Args:
        out: the folder of the runs.
        rounds: rounds per strategy.
        show: strategy name -> who is told of its rounds.
        step: told of every optimizer step.
        strategies: the names of the strategies.
    """
    setup: Setup = prepare(demo_recipe(strategies[0], rounds))
    results: list[Result] = []
    for name in strategies:
        results.append(execute(demo_recipe(name, rounds), out / name, setup=setup, show=show(name), step=step))
    report = write_report([result.folder for result in results], out / "report.html")
    return results, report
