"""The server of a real federation, killed at each step of a commit: every program its own process."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.federation.journal import read_records
from florana.recipe_file import check
from florana.run import execute
from tests import strikes
from tests.chaos.counts import Tally, digest
from tests.deployment import HANGS, PROGRAM, Fed, environment, federation, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# The ServerApp, and no other program, ends itself at the given step of its first commit.
HOOK = (
    Path(strikes.__file__).read_text()
    + """
if any("flwr-serverapp" in word for word in sys.orig_argv):
    strike(os.environ["CHAOS_RUN"], int(os.environ["CHAOS_STEP"]), os.environ["CHAOS_TOLD"])
"""
)


def started(fed: Fed, step: int, told: Path) -> subprocess.Popen[bytes]:
    """`florana serve --resume` whose ServerApp ends at that step of its first commit."""
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
            if step % 2:
                server.kill()  # the whole server
                server.wait(HANGS)
            else:
                # the ServerApp alone: the operator is told, and not left waiting
                assert server.wait(HANGS) == 4, log_of(fed)
                assert "the server's part of the run was killed" in log_of(fed)
                assert "--resume" in log_of(fed)
            assert rounds_of(fed) >= before, "a committed round is never lost"
        done = fed.serve("--resume", "--wait", str(HANGS), "--deadline", str(HANGS), "--no-base")
        assert done.returncode == 0, done.stdout + done.stderr
        records = read_records(fed.out / "rounds.jsonl")
    assert [record.round for record in records] == list(range(1, table["federation"]["rounds"] + 1))
    execute(check(table, "t"), tmp_path / "local")
    assert digest(fed.out) == digest(tmp_path / "local")
    tally(
        "SIGKILL of a deployed server, or of its ServerApp, at each step of a commit",
        len(at),
        "0 rounds lost, the same bytes at the end",
    )


def rounds_of(fed: Fed) -> int:
    return len(read_records(fed.out / "rounds.jsonl"))


def log_of(fed: Fed) -> str:
    return (fed.folder / "serve.log").read_text(errors="replace")[-3000:]
