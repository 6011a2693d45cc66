"""Clients in one pass (`[engine] cohort`) beside one after the other, and beside one big batch of the same rows.

    python benchmarks/cohort.py [--device cuda] [--cohort 16] [--turns 5] [--json FILE]
                                [--smollm2 FOLDER_OR_GGUF --gsm8k FOLDER] [--many 10000]

The peers do the same steps on the same rows: the local engine without the setting, and one adapter trained on batches
of all clients' rows at once (the most that a device gives). Turns alternate; one row each: median (least to most).
--many times a round of so many clients with a few rows and one step each, on the demo's encoder, with its peak memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu import ENCODER, card, distance, minilm_shape
from torch import Tensor

from florana.federation.local_engine import LocalEngine
from florana.federation.messages import Brief, Reply, pack, unpack_whole
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import Setup, prepare
from florana.runs.setup import engine_of, first_state
from florana.train.client import train_locally
from florana.train.gguf_files import dequantized


def classification(base: Path, device: str, clients: int, steps: int, rows: int = 16) -> Recipe:
    """Topics of docstrings for a classifier, `rows` rows of up to 64 tokens a step."""
    return check(
        {
            "task": "sequence-classification",
            "model": {"base": str(base), "target_modules": ["query", "value"], "device": device},
            "data": {"train": "stdlib-docstrings", "label": "topic", "max_length": 64, "test_limit": 64},
            "partition": {"kind": "iid", "clients": clients},
            "train": {"steps": steps, "batch_size": rows},
            "strategy": {"name": "fedit"},
        },
        "benchmark",
    )


def language(model: Path, gsm8k: Path, device: str, clients: int, steps: int, autocast: str) -> Recipe:
    """GSM8K for SmolLM2, every linear layer, eight rows of up to 256 tokens a step."""
    return check(
        {
            "task": "causal-lm",
            "model": {"base": str(model), "target_modules": "all-linear", "device": device},
            "data": {
                "train": str(gsm8k / "train.jsonl"),
                "test": str(gsm8k / "test.jsonl"),
                "text": ["question", "answer"],
                "max_length": 256,
                "test_limit": 16,
            },
            "partition": {"kind": "iid", "clients": clients},
            "train": {"steps": steps, "batch_size": 8, "learning_rate": 5e-4, "autocast": autocast},
            "strategy": {"name": "fedit"},
        },
        "benchmark",
    )


def engine_for(recipe: Recipe, setup: Setup, cohort: int) -> tuple[LocalEngine, list[Brief]]:
    """An engine, and what a first-class round asks of all its clients."""
    begun = first_state(recipe, setup, strategy_of(recipe, sorted(setup.clients)))
    payload = pack(begun.adapter)
    kinds = ["A", "B", "extra"]
    briefs = [
        Brief(2, client, number, payload, False, kinds, kinds, begun.adapter.scalings)
        for number, client in enumerate(sorted(setup.clients))
    ]
    engine = recipe.engine.model_copy(update={"cohort": cohort})
    return engine_of(recipe.model_copy(update={"engine": engine}), setup, begun), briefs


def timed(run: Any) -> float:
    """Wall-clock seconds, the device waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def one_round(engine: LocalEngine, briefs: list[Brief]) -> None:
    replies = list(engine.fit(briefs))
    assert all(hasattr(reply, "metrics") for reply in replies), replies


def measure(name: str, recipe: Recipe, cohort: int, turns: int) -> dict[str, str]:
    """The three ways of one round, in turn."""
    setup = prepare(recipe)
    everyone = [row for _, data in sorted(setup.clients.items()) for row in data.bins]
    big = recipe.train.model_copy(update={"batch_size": cohort * recipe.train.batch_size})

    def one_batch() -> None:
        setup.bench.load(setup.start)
        train_locally(setup.bench, everyone, big, 7, lambda: None)

    ways: dict[str, Any] = {}
    for size in (1, cohort):
        engine, briefs = engine_for(recipe, setup, size)
        ways[f"cohort {size}"] = lambda engine=engine, briefs=briefs: one_round(engine, briefs)
    ways["one big batch"] = one_batch
    start = dict(unpack_whole(briefs[0].payload, setup.start.scalings).tensors())
    updates = [_updates(*engine_for(recipe, setup, size), start) for size in (cohort, 1)]
    peaks: dict[str, float] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, run in ways.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            taken = timed(run)
            if torch.cuda.is_available():
                peaks[way] = torch.cuda.max_memory_allocated() / 2**30
            if turn:  # the first warms up
                seconds[way].append(taken)
    head = f"{name}, {len(setup.clients)} clients x {recipe.train.steps} steps x {recipe.train.batch_size} rows"
    table = {f"{head}: update beside that of one after the other, relative": f"{distance(*updates):.1e}"}
    for way, taken in seconds.items():
        gains = [before / after for before, after in zip(seconds["cohort 1"], taken, strict=True)]
        shares = [best / after for best, after in zip(seconds["one big batch"], taken, strict=True)]
        memory = f", {peaks[way]:.1f} GiB" if way in peaks else ""
        table[f"{head}: {way}"] = (
            f"{_shown(taken)} s, {_shown(gains)} times one after the other, {_shown(shares)} of one big batch{memory}"
        )
    return table


def _updates(engine: LocalEngine, briefs: list[Brief], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each client's training changed, by client and tensor."""
    found: dict[str, Tensor] = {}
    for reply in engine.fit(briefs):
        assert isinstance(reply, Reply), reply
        sent = unpack_whole(reply.payload, briefs[0].scalings).tensors()
        found |= {f"{reply.client}/{name}": tensor - start[name] for name, tensor in sent.items()}
    return found


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def many(device: str, count: int, cohort: int) -> dict[str, str]:
    """A round of very many small clients: each a few rows of sixty-four clients' shares, and one step."""
    recipe = classification(ENCODER, device, 64, 1, 4)
    setup = prepare(recipe)
    shares = sorted(setup.clients.items())
    clients = {}
    for number in range(count):
        _, share = shares[number % len(shares)]
        rows = [share.bins[(number + place) % len(share.bins)] for place in range(4)]
        clients[f"client-{number:05d}"] = dataclasses.replace(share, train=rows, bins=rows, test=())
    setup = dataclasses.replace(setup, clients=clients)
    found = {}
    for size in (1, cohort):
        engine, briefs = engine_for(recipe, setup, size)
        peaks = []

        def run(engine: LocalEngine = engine, briefs: list[Brief] = briefs, peaks: list[float] = peaks) -> None:
            for number, _ in enumerate(engine.fit(briefs)):  # a server that keeps nothing
                if number in (count // 4, count - 1):
                    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)

        taken = timed(run)
        found[f"{count} clients of 4 rows, one step each, demo's encoder: cohort {size}"] = (
            f"{taken:.0f} s; peak memory after a quarter {peaks[0]:.2f} GiB, at the end {peaks[1]:.2f} GiB"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cohort", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--no-minilm", action="store_true")
    given = parser.parse_args()
    rows: dict[str, Any] = card(given.device)
    print("".join(f"| {key} | {value} |\n" for key, value in rows.items()), end="", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        parts: list[tuple[str, Recipe]] = []
        if not given.no_minilm:
            base = minilm_shape(Path(scratch) / "minilm")
            parts.append(("MiniLM's shape", classification(base, given.device, given.cohort, given.steps)))
        if given.smollm2 is not None:
            model = given.smollm2
            model = dequantized(model, model.name) if model.is_file() else model
            for autocast in ("none", "bfloat16"):
                recipe = language(
                    model, given.gsm8k.resolve(), given.device, given.cohort, max(1, given.steps // 10), autocast
                )
                parts.append((f"SmolLM2, {'float32' if autocast == 'none' else autocast}", recipe))
        for name, recipe in parts:
            found = measure(name, recipe, given.cohort, given.turns)
            print("".join(f"| {key} | {value} |\n" for key, value in found.items()), end="", flush=True)
            rows |= found
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")
        if given.many:
            found = many(given.device, given.many, given.cohort)
            print("".join(f"| {key} | {value} |\n" for key, value in found.items()), end="", flush=True)
            rows |= found
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
