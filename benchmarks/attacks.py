"""The tables of docs/reliability.md: how far hostile clients move the global model, and what turned labels leave of it.

    PYTHONPATH=. python benchmarks/attacks.py movement|text [--strategies NAME ...] [--seeds 1]

`movement`: the worst of all attacks and strategies, in clean steps (tests/attacks.py), with and without the bound on
what a recipe's training can reach. `text`: docstring topics, two of ten on turned labels, their updates times five.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tests.attacks import Setting
from tests.attacks_on_text import accuracy
from tests.chaos.test_attacks import CROWDS, RULES, WITH_ROWS, offered, worst

from florana.strategy import STRATEGIES


def movement(strategies: Sequence[str], reach: bool) -> None:
    print(f"\nreach {'known' if reach else 'unknown'}\n")
    print("| hostile of clients | " + " | ".join(RULES) + " |\n|---|" + "---:|" * len(RULES), flush=True)
    for clients, hostile in CROWDS:
        cells = []
        for rule in RULES:
            some = [name for name in strategies if offered(name, rule, clients, hostile)]
            if not some:
                cells.append("not offered")
                continue
            found = max((*worst(Setting(s, clients, hostile, rule, reach), [*WITH_ROWS])[:2], s) for s in some)
            cells.append(f"{found[0]:.1f} ({found[2]}, {found[1]})")
        print(f"| {hostile} of {clients} | " + " | ".join(cells) + " |", flush=True)


def text(strategies: Sequence[str], seeds: int) -> None:
    print(
        "| strategy | seed | without the two | " + " | ".join(RULES) + " |\n|---|---:|---:|" + "---:|" * len(RULES),
        flush=True,
    )
    for strategy in strategies:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                runs = [("none", 0.0), *((rule, 5.0) for rule in RULES)]
                found = [
                    accuracy(rule, 2, factor, Path(folder) / str(number), strategy, seed)
                    for number, (rule, factor) in enumerate(runs)
                ]
            print(f"| {strategy} | {seed} | " + " | ".join(f"{value:.3f}" for value in found) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["movement", "text"])
    parser.add_argument("--strategies", nargs="*", choices=[*STRATEGIES])
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "text":
        text(options.strategies or ["fedit", "best-rank"], options.seeds)
        return
    for reach in (True, False):
        movement(options.strategies or [*STRATEGIES], reach)


if __name__ == "__main__":
    main()
