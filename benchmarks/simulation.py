"""Rounds of a simulation, beside Flower's own simulation engine (Ray) running the same recipe with the same bytes.

    PYTHONPATH=. python benchmarks/simulation.py [--rounds 8] [--turns 3]

The demo's six clients on this machine's processors, each kind of engine a program of its own, in turn. What counts is
the time from one committed round to the next, seen from outside (the first one, in which models are loaded, is left
out); `start` is what comes before the first round is there. Flower's peer has one processor a client, so that it
trains as many clients side by side as there are processors.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.deployment import environment, simulation

from florana.demo.demo import demo_recipe
from florana.flower.app.export import export
from florana.flower.app.settings import Settings
from florana.recipe.load import check
from florana.recipe.schema import Recipe

FLOWER = "Flower's simulation, one processor a client"
KINDS = {
    "one process, a thread a processor": {"threads": os.cpu_count(), "engine": {}},
    "engine.workers": {"threads": 1, "engine": {"workers": os.cpu_count()}},
    "engine.cohort": {"threads": os.cpu_count(), "engine": {"cohort": 6}},
    FLOWER: {"threads": 1, "engine": {}},
}
POLL = 0.05
"""Seconds: whoever looks more often takes the processors from threads that wait for one another."""


def recipe(kind: str, rounds: int) -> Recipe:
    """The demo's FedIT run, without its scores."""
    table = demo_recipe("fedit").model_dump(exclude_none=True)
    table["federation"]["rounds"] = rounds
    table["evaluate"] = {"every": rounds, "personal": "never"}
    return check({**table, **KINDS[kind]}, "benchmark")


@contextlib.contextmanager
def program(kind: str, given: Recipe, folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What to start, and in which environment; Flower's SuperLink is up meanwhile."""
    own = environment(folder / "home")
    own["OMP_NUM_THREADS"] = str(given.threads)
    own.pop("OMP_WAIT_POLICY", None)  # what the tests set, since they share their machine
    if kind != FLOWER:
        (folder / "recipe.toml").write_text(given.to_toml())
        yield [sys.executable, "-m", "florana", "run", str(folder / "recipe.toml"), "--out", str(folder / "run")], own
        return
    app = export(given, folder / "app", Settings(out=str(folder / "run")))
    nodes = f"num-supernodes={given.partition.clients} client-resources-num-cpus=1"
    with simulation(folder / "home", own):
        yield ["flwr", "run", str(app), "own", "--stream", "--federation-config", nodes], own


def committed(folder: Path) -> int:
    """How many rounds there are."""
    file = folder / "run" / "rounds.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def seconds(kind: str, rounds: int) -> tuple[float, list[float]]:
    """Until the first round is there, and from each round to the next."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with program(kind, recipe(kind, rounds), folder) as (command, own):
            begin, seen, times = time.perf_counter(), 0, []
            child = subprocess.Popen(
                command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
            while seen < rounds:
                if (now := committed(folder)) > seen:
                    seen = now
                    times.append(time.perf_counter())
                elif child.poll() not in (None, 0):
                    raise SystemExit(child.communicate()[0].decode(errors="replace"))
                time.sleep(POLL)
            child.communicate()
    assert len(times) == rounds, "two rounds between two looks"
    return times[0] - begin, [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    """Measure in turns, and print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    starts: dict[str, list[float]] = {kind: [] for kind in KINDS}
    each: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(given.turns):
        for kind in KINDS:
            start, taken = seconds(kind, given.rounds)
            starts[kind].append(start)
            each[kind].append(statistics.median(taken))
    print("| engine | seconds a round | times Flower's speed | start, seconds |")
    print("|---|---:|---:|---:|")
    for kind, taken in each.items():
        ratios = [flower / own for flower, own in zip(each[FLOWER], taken, strict=True)]
        print(
            f"| {kind} | {statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f}) | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{statistics.median(starts[kind]):.1f} |"
        )


if __name__ == "__main__":
    main()
