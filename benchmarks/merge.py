"""`florana merge` beside reading, averaging and writing the same adapters: seconds as a ratio, peak memory, error.

    python benchmarks/merge.py [--only llama|roberta] [--repeats N]

Two piles of adapters with random factors are made in a temporary folder and removed again: five of rank 16 with the
modules of Llama-2-7B (0.8 GB), a thousand of rank 4 with those of RoBERTa-large's queries and values (1.6 GB). The peer
does what no merge can do without: it reads every file through safetensors, averages A and B entry by entry, and writes
the result. Both run in turn, each time in a fresh process, so that the peak memory is each one's own; the files are in
the page cache for both. Seconds are those of the work, without imports; `whole` is the process from start to end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Pile:
    """Adapters to merge: how many, of what rank, and the (out, in) of each module; the goals they are held to."""

    name: str
    count: int
    rank: int
    shapes: dict[str, tuple[int, int]]
    most_memory: float
    most_ratio: float | None


def llama(count: int = 5, rank: int = 16, hidden: int = 4096, inner: int = 11008, layers: int = 32) -> Pile:
    """The seven projections of every layer of Llama-2-7B: 224 modules."""
    square = {f"self_attn.{letter}_proj": (hidden, hidden) for letter in "qkvo"}
    wide = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in (square | wide).items()}
    return Pile("five of rank 16, Llama-2-7B", count, rank, shapes, most_memory=1.5e9, most_ratio=2.0)


def roberta(count: int = 1000, rank: int = 4, hidden: int = 1024, layers: int = 24) -> Pile:
    """Query and value of every layer of RoBERTa-large: 48 modules."""
    names = [f"roberta.encoder.layer.{i}.attention.self.{part}" for i in range(layers) for part in ("query", "value")]
    shapes = dict.fromkeys(names, (hidden, hidden))
    return Pile("1,000 of rank 4, RoBERTa-large", count, rank, shapes, most_memory=1e9, most_ratio=None)


def make(pile: Pile, folder: Path) -> None:
    """Independent normal factors, a seed per adapter; the layout and the configuration are PEFT's."""
    import torch
    from safetensors.torch import save_file

    config = {
        "base_model_name_or_path": pile.name,
        "lora_alpha": 2 * pile.rank,
        "peft_type": "LORA",
        "r": pile.rank,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in pile.shapes}),
    }
    for u in range(pile.count):
        generator = torch.Generator().manual_seed(u)
        tensors = {}
        for name, (out, into) in pile.shapes.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(pile.rank, into, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, pile.rank, generator=generator)
        own = folder / f"adapter-{u:04d}"
        own.mkdir()
        save_file(tensors, own / WEIGHTS, metadata={"format": "pt"})
        (own / "adapter_config.json").write_text(json.dumps(config))


def peer(folders: list[Path], out: Path) -> dict[str, float]:
    """Read all, average in place, write: one pass over every file, one adapter's worth of sums."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    started = time.perf_counter()
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        with safe_open(folder / WEIGHTS, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (not a dict)
                tensor = stream.get_tensor(key)
                if key in total:
                    total[key].add_(tensor, alpha=1 / len(folders))
                else:
                    total[key] = tensor / len(folders)
    out.mkdir()
    save_file(total, out / WEIGHTS, metadata={"format": "pt"})
    return {"seconds": time.perf_counter() - started}


def ours(folders: list[Path], out: Path) -> dict[str, float]:
    from florana.adapters.merge import merge

    started = time.perf_counter()
    merged = merge(folders, out)
    return {"seconds": time.perf_counter() - started, "error": merged.error, "optimum": merged.optimum}


def fresh(who: str, pile: Path, out: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--child", who, str(pile), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    whole = time.perf_counter() - started
    shutil.rmtree(out)
    return {**json.loads(done.stdout), "whole": whole}


def child(who: str, pile: Path, out: Path) -> None:
    from florana.runs.dry_run import peak_memory

    folders = sorted(pile.iterdir())
    result = {"peer": peer, "florana": ours}[who](folders, out)
    print(json.dumps({**result, "memory": peak_memory()}))


def compare(pile: Pile, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "pile", Path(place) / "out"
        folder.mkdir()
        make(pile, folder)
        os.sync()
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        print(f"{pile.name}: {pile.count} files, {len(pile.shapes)} modules, {size / 1e9:.2f} GB, {repeats} pairs")
        runs: dict[str, list[dict[str, Any]]] = {"peer": [], "florana": []}
        for _ in range(repeats):
            for who, results in runs.items():
                results.append(fresh(who, folder, out))
    for who, results in runs.items():
        seconds, whole = (statistics.median(r[key] for r in results) for key in ("seconds", "whole"))
        memory = max(r["memory"] for r in results)
        tail = f"error {results[0]['error']:.6f}, optimum {results[0]['optimum']:.6f}" if who == "florana" else ""
        print(f"  {who:8} {seconds:7.2f} s  (whole {whole:6.2f} s)  {memory / 1e9:5.2f} GB  {tail}")
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs["peer"], runs["florana"], strict=True)]
    goal = f", goal {pile.most_ratio:.1f}" if pile.most_ratio else ""
    print(f"  ratio    median {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f}){goal}; "
          f"memory goal {pile.most_memory / 1e9:.1f} GB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("llama", "roberta"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("WHO", "PILE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        who, pile, out = arguments.child
        child(who, Path(pile), Path(out))
        return
    for name, shape in (("llama", llama), ("roberta", roberta)):
        if arguments.only in (None, name):
            compare(shape(), arguments.repeats)


if __name__ == "__main__":
    main()
