"""Peak memory of one round over many large adapters, whose updates lie on the disk: gate, weighing, rule, figures.

    python benchmarks/spool.py --shape llama-2-7b --clients 1000 --strategy fedit --folder DIR [--limit-gb 3]

Made-up adapters (rank 16 on q and v; 33.6 MB each of Llama-2-7B's shape, 3.1 MB of RoBERTa-large's) come one after the
other, as from a network. Printed: seconds of collecting and of the rule, the most memory that was the process's own
(RssAnon) and what the kernel had mapped of files beside it (RssFile: pages that it drops when memory is wanted).
--limit-gb holds the process to so much in all, mapped pages included (a cgroup, as root on Linux): an honest proof.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from florana import Adapter, LoraFactors
from florana.adapters.adapter_folder import AdapterCard
from florana.federation.journal import Journal
from florana.federation.loop import run_rounds
from florana.federation.messages import Brief, Reply
from florana.federation.terms import Federation
from florana.federation.weighting import Weighing, by_examples
from florana.strategy import STRATEGIES, builder

SHAPES = {"llama-2-7b": (32, 4096), "roberta-large": (24, 1024)}
"""Layers and width; q and v of each."""
RANK = 16


class MadeUp:
    """Clients that move what they are sent by a little noise, each by its own."""

    def fit(self, briefs: Sequence[Brief]) -> Iterator[Reply]:
        for brief in briefs:
            draws = torch.Generator().manual_seed(brief.seed % 2**63)
            noise = 0.01 * torch.randn(2**18, generator=draws)
            tensors = {
                name: tensor + noise[997 * place :][: tensor.numel()].reshape(tensor.shape)
                for place, (name, tensor) in enumerate(load(brief.payload).items())
                if name.partition("/")[0] in brief.returns
            }
            yield Reply(brief.client, brief.round, 100, {"train_loss": 1.0}, save(tensors), 0.0)

    def memories(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {}

    def remember(self, client: str, memory: Mapping[str, Tensor]) -> None:
        pass


def watch(peaks: dict[str, int], done: threading.Event) -> None:
    """The largest RssAnon and RssFile, looked at ten times a second."""
    while not done.wait(0.1):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                peaks[name] = max(peaks.get(name, 0), int(value.split()[0]))


def limited(gigabytes: float) -> None:
    """Put this process into a cgroup of its own with so much memory, files' pages included."""
    group = Path("/sys/fs/cgroup/memory/florana-benchmark")
    if not group.parent.is_dir():
        group = Path("/sys/fs/cgroup/florana-benchmark")
    group.mkdir(exist_ok=True)
    limit = group / "memory.limit_in_bytes"
    (limit if limit.exists() else group / "memory.max").write_text(str(int(gigabytes * 2**30)))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="roberta-large")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--strategy", choices=sorted(STRATEGIES), default="fedit")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--limit-gb", type=float)
    given = parser.parse_args()
    if given.limit_gb:
        limited(given.limit_gb)
    layers, width = SHAPES[given.shape]
    draws = torch.Generator().manual_seed(0)
    first = Adapter(
        {
            f"layer.{layer}.{name}": LoraFactors(
                0.01 * torch.randn(width, RANK, generator=draws), torch.randn(RANK, width, generator=draws), 2.0
            )
            for layer in range(layers)
            for name in ("q", "v")
        }
    )
    build = builder(given.strategy)
    assert build is not None
    strategy = build()
    names = [f"client-{number:05d}" for number in range(given.clients)]
    federation = Federation(
        clients=names,
        rounds=1,
        per_round=len(names),
        seed=0,
        weighing=Weighing(by_examples),
        evaluate=None,
        measured=lambda round_: False,
        personal=lambda round_: False,
    )
    peaks: dict[str, int] = {}
    done = threading.Event()
    thread = threading.Thread(target=watch, args=(peaks, done), daemon=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        card = AdapterCard(base_model="made/up", task_type="CAUSAL_LM", target_modules=("q", "v"))
        thread.start()
        started = time.perf_counter()
        found = []
        run_rounds(
            strategy,
            strategy.init(first),
            MadeUp(),
            federation,
            Journal(Path(folder), card),
            lambda event: found.append(event) if event.kind == "committed" else None,
        )
        whole = time.perf_counter() - started
    done.set()
    record = found[-1].record
    held = f", held to {given.limit_gb:g} GB" if given.limit_gb else ""
    print(
        f"| {given.shape}, {given.clients} clients, {given.strategy}{held} "
        f"| {whole:.0f} s, rule {record.server_seconds:.0f} s "
        f"| own memory at most {peaks['RssAnon'] / 2**20:.2f} GiB, mapped {peaks['RssFile'] / 2**20:.2f} GiB |"
    )


if __name__ == "__main__":
    main()
