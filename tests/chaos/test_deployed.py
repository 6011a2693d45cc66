"""The server of a real federation, killed at each step of a commit: every program its own process."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.federation.journal import read_records
from florana.recipe.load import check
from florana.runs.setup import execute
from tests import strikes
from tests.chaos.counts import Tally, digest
from tests.deployment import PROGRAM, Fed, environment, federation
from tests.program import HANGS, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# The server, and no other program, ends itself at the given step of its first commit.
HOOK = (
    Path(strikes.__file__).read_text()
    + """
if "serve" in sys.orig_argv:
    strike(os.environ["CHAOS_RUN"], int(os.environ["CHAOS_STEP"]), os.environ["CHAOS_TOLD"])
"""
)


def started(fed: Fed, step: int, told: Path) -> subprocess.Popen[bytes]:
    """`florana serve --resume` that ends at that step of its first commit."""
    own = environment(fed.home)
    own |= {"PYTHONPATH": f"{fed.folder / 'hook'}:{own['PYTHONPATH']}"}
    own |= {"CHAOS_RUN": str(fed.out), "CHAOS_STEP": str(step), "CHAOS_TOLD": str(told)}
    command = [*PROGRAM, *fed.serving("--resume", "--wait", str(HANGS), "--deadline", str(HANGS), "--no-base")]
    with (fed.folder / "serve.log").open("wb") as log:
        return subprocess.Popen(command, env=own, stdout=log, stderr=log)


# in `make chaos` alone: tests/test_flower_page.py kills a deployed server in every test run
@pytest.mark.chaos
def test_a_server_that_dies_at_a_step_of_a_commit_goes_on(table: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    steps = range(1, 25)
    table["partition"]["clients"] = 1
    table["federation"] = {"rounds": len(steps) + 2, "min_clients": 1}
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    at: list[str] = []
    with federation(table, tmp_path, ["client-0"]) as fed:
        for step in steps:
            told, before = tmp_path / f"told-{step}", rounds_of(fed)
            server = started(fed, step, told)
            assert wait_for(lambda t=told, s=server: t.exists() or s.poll() is not None), log_of(fed)
            if not told.exists():
                assert server.wait(HANGS) == 0, log_of(fed)
                break  # a commit has fewer steps: the run went to its end
            at.append(told.read_text().splitlines()[-1])
            server.wait(HANGS)
            assert rounds_of(fed) >= before, "a committed round is never lost"
        done = fed.serve("--resume", "--wait", str(HANGS), "--deadline", str(HANGS), "--no-base")
        assert done.returncode == 0, done.stdout + done.stderr
        records = read_records(fed.out / "rounds.jsonl")
    assert [record.round for record in records] == list(range(1, table["federation"]["rounds"] + 1))
    execute(check(table, "t"), tmp_path / "local")
    assert digest(fed.out) == digest(tmp_path / "local")
    tally(
        "SIGKILL of a deployed server at each step of a commit",
        len(at),
        "0 rounds lost, the same bytes at the end",
    )


@pytest.mark.chaos
def test_every_site_is_back_after_a_server_died_with_answers_pending(
    table: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    """Killed in a round, at any moment from the requests to the commit: the resumed server has all sites in step."""
    kills, rng, names = 100, random.Random(5), ["client-0", "client-1", "client-2"]
    table["train"]["steps"] = 3
    table["federation"] = {"rounds": kills + 2, "min_clients": 3}
    options = ("--resume", "--wait", "120", "--deadline", "60", "--no-base")
    with federation(table, tmp_path, names) as fed:
        for _ in range(kills):
            before, asked = rounds_of(fed), lines_of(fed, '"round"')
            command = [*PROGRAM, *fed.serving(*options)]
            with (fed.folder / "serve.log").open("wb") as log:
                server = subprocess.Popen(command, env=environment(fed.home), stdout=log, stderr=log)
            assert wait_for(lambda a=asked: lines_of(fed, '"round"') > a, 120), log_of(fed)
            time.sleep(rng.uniform(0.0, 0.3))
            server.kill()
            server.wait(30)
            assert rounds_of(fed) >= before
        done = fed.serve(*options)
        assert done.returncode == 0, done.stdout + done.stderr
        records = read_records(fed.out / "rounds.jsonl")
    assert all(record.clients == names for record in records), "no site was ever out of step"
    execute(check(table, "t"), tmp_path / "local")
    assert digest(fed.out) == digest(tmp_path / "local")
    tally("SIGKILL of a deployed server with up to three answers pending", kills, "every site back at once, same bytes")


def lines_of(fed: Fed, word: str) -> int:
    path = fed.out / "progress.jsonl"
    return path.read_text().count(f'"kind": {word}') if path.exists() else 0


def rounds_of(fed: Fed) -> int:
    return len(read_records(fed.out / "rounds.jsonl"))


def log_of(fed: Fed) -> str:
    return (fed.folder / "serve.log").read_text(errors="replace")[-3000:]


@pytest.mark.chaos
def test_programs_and_their_logs_stay_as_large_as_they_are(table: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    """Five hundred rounds of three sites: what grows is a line in journals, progress and audit logs."""
    rounds, names = 500, ["client-0", "client-1", "client-2"]
    table["federation"] = {"rounds": rounds, "min_clients": 3}
    with federation(table, tmp_path, names) as fed:
        command = [*PROGRAM, *fed.serving("--wait", str(HANGS), "--deadline", str(HANGS), "--no-base")]
        with (fed.folder / "serve.log").open("wb") as log:
            server = subprocess.Popen(command, env=environment(fed.home), stdout=log, stderr=log)
        programs = {"server": server, **fed.sites}
        seen: dict[int, dict[str, int]] = {}
        for at in (rounds // 5, rounds - 20):
            assert wait_for(lambda at=at: lines_of(fed, '"committed"') >= at or server.poll() is not None, 3600)
            assert server.poll() is None, log_of(fed)
            seen[at] = {name: psutil.Process(one.pid).memory_info().rss for name, one in programs.items()}
            seen[at] |= {str(path.relative_to(fed.folder)): path.stat().st_size for path in fed.folder.rglob("*.log")}
        assert server.wait(HANGS) == 0, log_of(fed)
        records = read_records(fed.out / "rounds.jsonl")
        assert all(record.clients == names for record in records)
        spooled = list((fed.out / "spool").rglob("*")) if (fed.out / "spool").exists() else []
        kept = [path for name in names for path in (fed.folder / name / "kept").rglob("*") if path.is_file()]
    first, last = seen.values()
    hundreds = (rounds - 20 - rounds // 5) / 100
    growth = {name: (last[name] - first[name]) / 2**20 / hundreds for name in programs}
    assert max(growth.values()) <= 1.0, growth
    logs = {name: last[name] - first[name] for name in first if name.endswith(".log")}
    spoken = logs.pop("serve.log")  # a line for each round, for whoever watches
    assert spoken <= 200 * hundreds * 100
    assert all(more <= 300 * hundreds * 100 for more in logs.values()), logs
    assert spooled == []
    assert len(kept) <= 6 * len(names), kept
    most = max(growth, key=lambda name: growth[name])
    said = f"{growth[most]:+.2f} MiB per 100 rounds at most ({most}); {sum(logs.values()) / hundreds:.0f} bytes of logs"
    tally("rounds of a server and three sites, each a program", rounds, said)
