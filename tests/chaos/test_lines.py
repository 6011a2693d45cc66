"""A federation over lines that fail, and with sites that stand still: every program its own process."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.federation.journal import read_records
from florana.recipe.load import check
from florana.runs.setup import execute
from tests.chaos.counts import Tally, digest
from tests.deployment import PROGRAM, environment, federation, free_port
from tests.program import HANGS, wait_for
from tests.proxy import Line, proxy

pytestmark = [pytest.mark.chaos, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
NAMES = ["client-0", "client-1", "client-2"]


def trainings(folder: Path, name: str) -> int:
    """How often a site has trained, by its own count of the day."""
    return len(json.loads((folder / name / "kept" / "trained.json").read_text()))


@pytest.mark.parametrize(
    "line",
    [Line(drops=0.05), Line(delay=0.15), Line(silent=0.004)],
    ids=["one chunk in twenty is dropped", "300 ms there and back", "connections fall silent"],
)
def test_fifty_rounds_over_a_line_that_fails(
    line: Line, table: dict[str, Any], tmp_path: Path, tally: Tally, request: pytest.FixtureRequest
) -> None:
    """Each update counts, and none is trained twice: the bytes are those of a run without a network."""
    rounds = 50
    table["federation"] = {"rounds": rounds, "min_clients": 3}
    with federation(table, tmp_path, NAMES, join=False) as fed:
        behind, fed.port = fed.port, free_port()
        with proxy(behind, fed.port, line):
            for name in NAMES:
                fed.join(name)
            done = fed.serve("--deadline", "300", "--wait", str(HANGS), timeout=1500)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Traceback" not in done.stderr
            for name in NAMES:
                fed.sites[name].wait(HANGS)
        records = read_records(fed.out / "rounds.jsonl")
        assert [record.round for record in records] == list(range(1, rounds + 1))
        assert all(len(record.clients) == len(NAMES) for record in records)
        assert [trainings(tmp_path, name) for name in NAMES] == [rounds] * len(NAMES), "none trained twice"
        execute(check(table, "t"), tmp_path / "local")
        assert digest(fed.out) == digest(tmp_path / "local")
    met = f"{line.chunks} chunks, {line.broken} connections broken off, {line.silenced} fell silent"
    tally(f"rounds over a line that fails: {request.node.callspec.id}", rounds, f"all done, the same bytes ({met})")


def test_sites_that_stand_still_beyond_the_deadline(table: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    """SIGSTOP, and SIGCONT long after its round has ended: the others went on, and it takes part again."""
    rounds, stops, deadline = 120, 50, 2
    table["federation"] = {"rounds": rounds, "min_clients": 2}
    rng, stopped = random.Random(0), 0
    with federation(table, tmp_path, NAMES, join=False) as fed:
        for name in NAMES:
            fed.join(name)
        command = [*PROGRAM, *fed.serving("--deadline", str(deadline), "--wait", str(HANGS))]
        with (tmp_path / "serve.log").open("wb") as log:
            server = subprocess.Popen(command, env=environment(fed.home), stdout=log, stderr=log, cwd=tmp_path)

        def done() -> int:
            return len(read_records(fed.out / "rounds.jsonl")) if (fed.out / "rounds.jsonl").exists() else 0

        assert wait_for(lambda: done() > 0)
        stops_of: list[tuple[str, int]] = []
        while stopped < stops and server.poll() is None:
            victim, before = fed.sites[name := rng.choice(NAMES)], done()
            time.sleep(rng.random() * 0.5)
            victim.send_signal(signal.SIGSTOP)
            try:
                assert wait_for(lambda before=before: done() > before + 1 or server.poll() is not None)
            finally:
                victim.send_signal(signal.SIGCONT)
            stopped += 1
            stops_of.append((name, done()))
        assert server.wait(HANGS) == 0, (tmp_path / "serve.log").read_text()
        assert "Traceback" not in (tmp_path / "serve.log").read_text()
        records = read_records(fed.out / "rounds.jsonl")
        assert len(records) == rounds
        assert all(len(record.clients) >= 2 for record in records)
        late = sum(len(record.refused) for record in records)
        for name, at in stops_of:
            assert any(name in record.clients for record in records[at:]), (name, at)
    tally("SIGSTOP of a site beyond the deadline, then SIGCONT", stopped, f"every round done, {late} answers missing")
