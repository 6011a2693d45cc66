"""What a GPU does with florana: the CPU's updates, the engine beside a bare loop, the rules, a language model.

    python benchmarks/gpu.py [--device cuda] [--json FILE] [--only parity,engine,rules]
                             [--smollm2 FOLDER_OR_GGUF --gsm8k FOLDER]

Needs no network: MiniLM's shape with random weights stands for MiniLM. Each part is measured by itself, and one that
fails is shown as what it raised. Times are wall clock after a warm-up, the device waited for, median (min to max).

    parity   one client's update after 10 steps, || d_gpu - d_cpu || / || d_cpu || over all tensors
    engine   seconds of the local engine / seconds of a bare PyTorch + PEFT loop over the same clients and steps
    rules    one 4096 x 4096 module, r = 16, 10 and 100 clients: milliseconds on the device, and the result's distance
             from the CPU's
    smollm2  GSM8K text: tokens a second in training, held-out loss before and after, exact match of 64 written answers
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from aggregation import clients as synthetic
from engine import bare
from torch import Tensor

from florana import Adapter, Contribution, LoraFactors, best_rank, mean, mix
from florana.federation.sampling import derive
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.prepared import Setup, prepare
from florana.runs.setup import execute, global_scores
from florana.train.client import train_locally
from florana.train.gguf_files import dequantized

ENCODER = Path(__file__).resolve().parents[1] / "src" / "florana" / "demo" / "tiny-encoder"


def minilm_shape(folder: Path) -> Path:
    """A BERT of all-MiniLM-L6-v2's shape with random weights, and the demo's tokenizer, in a folder."""
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ENCODER / name).read_bytes())
    return folder


def classification(base: Path, device: str, rounds: int, steps: int, dtype: str = "float32") -> Recipe:
    """Topics of docstrings for a classifier: four clients, 16 rows of 64 tokens a step."""
    return check(
        {
            "task": "sequence-classification",
            "model": {"base": str(base), "target_modules": ["query", "value"], "device": device, "dtype": dtype},
            "data": {"train": "stdlib-docstrings", "label": "topic", "max_length": 64, "test_limit": 64},
            "partition": {"kind": "iid", "clients": 4},
            "train": {"steps": steps, "batch_size": 16},
            "federation": {"rounds": rounds},
            "strategy": {"name": "fedit"},
            "evaluate": {"every": 1000, "personal": "never"},
        },
        "benchmark",
    )


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall-clock seconds of each repeat, the device waited for; one warm-up before."""
    taken = []
    for turn in range(repeats + 1):
        _wait()
        started = time.perf_counter()
        run()
        _wait()
        if turn:
            taken.append(time.perf_counter() - started)
    return taken


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _shown(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """|| first - second || / || second ||, over all tensors, in float64 on the CPU."""
    apart = sum(float((first[n].cpu().double() - t.cpu().double()).square().sum()) for n, t in second.items())
    return (apart / sum(float(t.cpu().double().square().sum()) for t in second.values())) ** 0.5


def parity(device: str, folder: Path) -> dict[str, object]:
    rows: dict[str, object] = {}
    for name, base in (("demo's encoder", ENCODER), ("MiniLM's shape", minilm_shape(folder / "minilm"))):
        updates = []
        for place in ("cpu", device):
            settings = classification(base, place, 1, 10)
            setup = prepare(settings)
            before = setup.start.tensors()
            client = setup.clients[sorted(setup.clients)[0]]
            setup.bench.load(setup.start)
            train_locally(setup.bench, client.train, settings.train, 7, lambda: None)
            updates.append({n: t - before[n] for n, t in setup.bench.adapter().tensors().items()})
        rows[f"parity: update of {name}, device beside CPU, relative"] = f"{distance(updates[1], updates[0]):.2e}"
    return rows


def engine(device: str, folder: Path) -> dict[str, object]:
    rows: dict[str, object] = {}
    base = minilm_shape(folder / "minilm")
    for place in (device,):
        settings = classification(base, place, 2, 20)
        setup = prepare(settings)
        turns = iter(range(1000))

        def ours(settings: Recipe = settings, setup: Setup = setup, turns: Any = turns) -> None:
            with tempfile.TemporaryDirectory() as out:
                execute(settings, Path(out) / f"run-{next(turns)}", setup=setup)

        repeats = 3
        mine = seconds(ours, repeats)
        theirs = seconds(lambda settings=settings, setup=setup: bare(settings, setup, 2), repeats)
        steps = 4 * 2 * 20
        rows[f"engine: {place}, MiniLM's shape, 16 rows a step, ms per step"] = _shown(mine, 1e3 / steps, 2)
        rows[f"engine: {place}, bare loop, ms per step"] = _shown(theirs, 1e3 / steps, 2)
        rows[f"engine: {place}, engine / bare loop"] = f"{statistics.median(mine) / statistics.median(theirs):.3f}"
    return rows


def rules(device: str, folder: Path) -> dict[str, object]:
    rows: dict[str, object] = {}
    for count in (10, 100):
        here = synthetic(count, 4096, 16)
        there = [_moved(part, device) for part in here]
        for name, rule in (
            ("mean", lambda parts: mean(parts)),
            ("best-rank", lambda parts: best_rank(parts, rank=16)),
            ("flora-na", lambda parts: mix(parts).adapter),
        ):
            key = f"rules: {name}, {count} clients, 4096 x 4096, r 16"
            try:
                rows[f"{key}, ms on the device"] = _shown(seconds(lambda: rule(there), 5), 1e3, 2)  # noqa: B023
                slow = seconds(lambda: rule(here), 1)  # noqa: B023
                rows[f"{key}, ms on the CPU"] = f"{1e3 * slow[0]:.1f}"
                rows[f"{key}, product beside CPU's, relative"] = f"{_products_apart(rule(there), rule(here)):.1e}"
            except Exception as error:  # one rule that fails leaves the others their rows
                rows[f"{key}, failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return rows


def _moved(part: Contribution, device: str) -> Contribution:
    modules = {
        name: LoraFactors(B=pair.B.to(device), A=pair.A.to(device), scaling=pair.scaling)
        for name, pair in part.adapter.modules.items()
    }
    return dataclasses.replace(part, adapter=Adapter(modules))


def _products_apart(first: Adapter, second: Adapter) -> float:
    products = [
        {n: p.scaling * p.B.cpu().double() @ p.A.cpu().double() for n, p in adapter.modules.items()}
        for adapter in (first, second)
    ]
    return distance(products[0], products[1])


def smollm2(device: str, model: Path, gsm8k: Path, dtype: str) -> dict[str, object]:
    rows: dict[str, object] = {}
    written = {
        "task": "gsm8k",
        "file": str(gsm8k / "test.jsonl"),
        "prompt": "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "limit": 64,
        "max_new_tokens": 160,
        "batch_size": 64,
    }
    settings = check(
        {
            "task": "causal-lm",
            "model": {"base": str(model), "target_modules": "all-linear", "device": device, "dtype": dtype},
            "data": {
                "train": str(gsm8k / "train.jsonl"),
                "test": str(gsm8k / "test.jsonl"),
                "text": ["question", "answer"],
                "max_length": 256,
                "test_limit": 256,
            },
            "partition": {"kind": "length", "clients": 4},
            "train": {"steps": 20, "batch_size": 16, "learning_rate": 5e-4},
            "federation": {"rounds": 3},
            "strategy": {"name": "best-rank"},
            "evaluate": {"every": 1000, "personal": "never"},
            "generation": written,
        },
        "benchmark",
    )
    started = time.perf_counter()
    setup = prepare(settings)
    rows[f"smollm2: {dtype}, load and tokenise, s"] = f"{time.perf_counter() - started:.1f}"
    before = global_scores(setup, setup.start, None, 64)
    client = setup.clients[sorted(setup.clients)[-1]]
    setup.bench.load(setup.start)
    taken = seconds(lambda: train_locally(setup.bench, client.train, settings.train, 7, lambda: None), 1)
    tokens = _tokens(settings, client.train, 7)
    rows[f"smollm2: {dtype}, training, tokens a second (16 rows a step, unpadded)"] = f"{tokens / taken[0]:,.0f}"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        last = execute(settings, Path(out) / "run", setup=setup).records[-1]
        rows[f"smollm2: {dtype}, 3 rounds of 4 clients x 20 steps, with scoring, s"] = (
            f"{time.perf_counter() - started:.1f}"
        )
    after = last.eval["global"]
    rows[f"smollm2: {dtype}, held-out loss before -> after"] = f"{before['loss']:.3f} -> {after['loss']:.3f}"
    others = {name: round(value, 4) for name, value in after.items() if name != "loss"}
    rows[f"smollm2: {dtype}, other figures after the last round"] = json.dumps(others)
    if device == "cuda":
        rows[f"smollm2: {dtype}, peak memory on the card, GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
    return rows


def _tokens(settings: Recipe, examples: Any, seed: int) -> int:
    """Tokens of the rows that `train_locally` visits with that seed."""
    rng, order, total = np.random.default_rng(seed), [], 0
    for _ in range(settings.train.steps or 0):
        if not order:
            order = rng.permutation(len(examples)).tolist()
        chosen, order = order[: settings.train.batch_size], order[settings.train.batch_size :]
        total += sum(len(examples[row].ids) for row in chosen)
    return total


def card(device: str) -> dict[str, object]:
    """The device and the libraries, for the head of the table."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    return {
        "device": name,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "seed": derive(0, "model"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="parity,engine,rules")
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    given = parser.parse_args()
    gsm8k = given.gsm8k.resolve() if given.gsm8k else None
    parts: dict[str, Callable[[str, Path], dict[str, object]]] = {"parity": parity, "engine": engine, "rules": rules}
    rows = card(given.device)
    with tempfile.TemporaryDirectory() as scratch:
        work = {name: parts[name] for name in given.only.split(",") if name}
        if given.smollm2 is not None:
            model = given.smollm2
            if model.is_file():
                started = time.perf_counter()
                model = dequantized(model, model.name)
                rows["smollm2: GGUF to a folder, s"] = f"{time.perf_counter() - started:.1f}"
            for dtype in given.dtypes.split(","):
                work[f"smollm2 {dtype}"] = lambda device, _, dtype=dtype: smollm2(device, model, gsm8k, dtype)
        for name, part in work.items():
            started = time.perf_counter()
            try:
                rows |= part(given.device, Path(scratch))
            except Exception as error:
                traceback.print_exc()
                rows[f"{name}: failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows[f"{name}: the part took, s"] = f"{time.perf_counter() - started:.0f}"
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")
    for key, value in rows.items():
        print(f"| {key} | {value} |")


if __name__ == "__main__":
    main()
