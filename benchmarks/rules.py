"""What a robust rule costs a round, as a ratio to averaging the same factors (FedIT = 1), beside the best-rank step.

    python benchmarks/rules.py [--clients 10 100] [--threads 1] [--repeats 5]

Clients of RoBERTa-large's shape (48 modules of 1024 x 1024, rank 8): a shared start and a small step of each, from a
seed. A rule's time is all that `[robust]` adds before the strategy: the inner products of the clients' changes, the
rule, and what is drawn back. All in this process, in turn; the median of the repeats, with the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from florana import Adapter, Contribution, LoraFactors, best_rank, mean
from florana.federation.weighting import Weighing, by_examples, weigh
from florana.lora.factors import Update
from florana.recipe.robust_schema import Robust
from florana.strategy.base import Payload

MODULES, SIZE, RANK = 48, 1024, 8


def start(generator: torch.Generator) -> Adapter:
    """What was broadcast."""

    def pair() -> LoraFactors:
        drawn = torch.randn(SIZE + SIZE, RANK, generator=generator) / SIZE**0.5
        return LoraFactors(B=drawn[:SIZE], A=drawn[SIZE:].T.contiguous(), scaling=2.0)

    return Adapter({f"layer.{n}": pair() for n in range(MODULES)})


def moved(before: Adapter, generator: torch.Generator) -> Adapter:
    """After a client's training: every number a tenth of the start's size away."""
    return replace(
        before,
        modules={
            name: replace(
                pair,
                B=pair.B + 0.1 * torch.randn(pair.B.shape, generator=generator) / SIZE**0.5,
                A=pair.A + 0.1 * torch.randn(pair.A.shape, generator=generator) / SIZE**0.5,
            )
            for name, pair in before.modules.items()
        },
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("| clients | what | seconds | times the mean |")
    print("|---:|---|---:|---:|")
    for count in given.clients:
        generator = torch.Generator().manual_seed(0)
        before = start(generator)
        updates = [Update(f"client-{n:03}", 1, moved(before, generator), 100 + n, {}) for n in range(count)]
        sent = {update.client: Payload(before) for update in updates}
        shares = by_examples(updates)
        parts = [Contribution(u.client, u.adapter, shares[u.client]) for u in updates]
        rules = {
            "clip": Robust(rule="clip"),
            "multi-krum": Robust(rule="multi-krum", hostile=count // 5),
            "geometric-median": Robust(rule="geometric-median"),
            "trimmed": Robust(rule="trimmed", hostile=count // 5),
        }
        peers: dict[str, Callable[[], object]] = {"mean of the factors (FedIT)": lambda parts=parts: mean(parts)}
        for name, own in rules.items():
            how = Weighing(by_examples, None, own.build(), name)
            peers[name] = lambda u=updates, s=sent, how=how: weigh(u, s, how)
        peers["best-rank's step"] = lambda parts=parts: best_rank(parts, rank=RANK)
        times: dict[str, list[float]] = {name: [] for name in peers}
        for turn in range(given.repeats + 1):
            for name, run in peers.items():
                begin = time.perf_counter()
                run()
                if turn:  # the first warms up
                    times[name].append(time.perf_counter() - begin)
        base = statistics.median(times["mean of the factors (FedIT)"])
        for name, taken in times.items():
            middle = statistics.median(taken)
            print(f"| {count} | {name} | {middle:.3f} ({min(taken):.3f} to {max(taken):.3f}) | {middle / base:.1f} |")


if __name__ == "__main__":
    main()
