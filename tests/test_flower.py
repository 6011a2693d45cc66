"""Flower: the same bytes from the local engine, a simulation and a real deployment; and what the parts refuse."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.flower.export import export
from florana.flower.keys import Certificates
from florana.flower.processes import SWITCHED_OFF, free_port
from florana.flower.settings import Settings
from florana.recipe import Recipe
from florana.recipe_file import check
from florana.run import execute
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PROGRAM = [sys.executable, "-m", "florana"]


def environment(home: Path) -> dict[str, str]:
    """What a program of this test runs with: this source tree, one thread, no hub, nothing told to anyone."""
    return {
        **os.environ,
        **SWITCHED_OFF,
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FLWR_HOME": str(home),
    }


@pytest.fixture
def table(recipe_table: dict[str, Any]) -> dict[str, Any]:
    """Three clients of different ranks with heads of their own: everything that differs from client to client."""
    table = copy.deepcopy(recipe_table)
    table["partition"] = {"kind": "dirichlet", "clients": 3, "alpha": 1.0}
    table["federation"] = {"rounds": 2, "min_clients": 3}
    table["model"] |= {"client_ranks": [2, 1], "head": "personal"}
    table["strategy"] = {"name": "best-rank"}
    table["evaluate"] = {"personal": "never"}
    return table


def local(recipe: Recipe, table: dict[str, Any], folder: Path) -> Path:
    execute(recipe, folder / "local")
    return folder / "local"


def simulated(recipe: Recipe, table: dict[str, Any], folder: Path) -> Path:
    out, home = folder / "simulated", folder / "home"
    home.mkdir()
    app = export(recipe, folder / "app", Settings(out=str(out), wait=60, deadline=120))
    command = ["flwr", "run", str(app), "--stream", "--federation-config", "num-supernodes=3"]
    try:
        done = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=240, check=False)
        # Flower follows a run only while it is told; what counts is the run's own outcome
        assert wait_for(lambda: (out / "outcome.json").exists(), 120), done.stdout + done.stderr
    finally:
        end_all(home)
    return out


def deployed(recipe: Recipe, table: dict[str, Any], folder: Path) -> Path:
    with federation(table, folder, [f"client-{index}" for index in range(3)]) as fed:
        done = fed.serve("--wait", "120", "--deadline", "120")
        assert done.returncode == 0, done.stdout + done.stderr
    return fed.out


@pytest.mark.parametrize("engine", [local, simulated, deployed], ids=lambda engine: engine.__name__)
def test_the_same_recipe_ends_in_the_same_bytes_on_every_engine(
    engine: Callable[[Recipe, dict[str, Any], Path], Path],
    table: dict[str, Any],
    tmp_path: Path,
    reference: Callable[[dict[str, Any]], bytes],
) -> None:
    out = engine(check(table, "test"), table, tmp_path)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == reference(table)
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 2


@pytest.fixture
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], bytes]:
    def run(table: dict[str, Any]) -> bytes:
        folder = tmp_path_factory.mktemp("reference")
        execute(check(table, "test"), folder / "run")
        return (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()

    return run


# the deployment, as people would start it


class Fed:
    """An operator's and the sites' folders, and the programs that run in them."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe, self.port = folder, recipe, free_port()
        self.out, self.files = folder / "run", Certificates(folder / "fed")
        self.home = folder / "home"
        self.sites: dict[str, subprocess.Popen[bytes]] = {}

    def florana(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, *arguments],
            env=environment(self.home),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=self.folder,
        )

    def serving(self, *options: str) -> list[str]:
        place = ["--fed", str(self.files.folder), "--out", str(self.out), "--host", "127.0.0.1"]
        return ["serve", str(self.recipe), *place, "--port", str(self.port), *options]

    def serve(self, *options: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return self.florana(*self.serving(*options), timeout=timeout)

    def join(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        command = [*PROGRAM, "join", str(self.folder / "invitation"), "--site", str(self.folder / name), *options]
        with (self.folder / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(command, env=environment(self.home), stdout=log, stderr=log)
        self.sites[name] = started
        return started


@contextmanager
def federation(table: dict[str, Any], folder: Path, names: list[str], join: bool = True) -> Iterator[Fed]:
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(table))
    fed = Fed(folder, recipe)
    try:
        for arguments in (
            ["flower", "keys", "--server", "127.0.0.1", "--out", str(fed.files.folder)],
            *(["flower", "keys", name, "--out", str(folder / name)] for name in names),
            ["flower", "approve", str(fed.files.folder), *(str(folder / name / f"{name}.pub") for name in names)],
            [
                *("flower", "invite", str(recipe), "--fed", str(fed.files.folder), "--port", str(fed.port)),
                *("--out", str(folder / "invitation")),
            ],
        ):
            done = fed.florana(*arguments)
            assert done.returncode == 0, done.stdout + done.stderr
        for name in names if join else []:
            fed.join(name)
        yield fed
    finally:
        for process in fed.sites.values():
            process.terminate()
        for process in fed.sites.values():
            process.wait(30)
        end_all(folder)


def end_all(folder: Path) -> list[int]:
    """End every process whose environment or command names this folder; returns those that were left."""
    import psutil

    left = []
    for process in psutil.process_iter():
        try:
            ours = str(folder) in " ".join(process.cmdline()) or str(folder) in process.environ().get("FLWR_HOME", "")
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.pid)
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
