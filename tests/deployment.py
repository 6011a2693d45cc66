"""A federation on this machine as people would start it: every program its own process, TLS, keys."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from florana.flower.deploy.keys import Certificates
from tests.conftest import ROOT
from tests.program import HANGS, florana, wait_for

SWITCHED_OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What Flower's own programs and Ray would tell the world or fetch from it."""

PROGRAM = [sys.executable, "-m", "florana"]


def environment(home: Path) -> dict[str, str]:
    """What a program of this test runs with: this source tree, one thread, no hub, nothing told to anyone."""
    return {
        **os.environ,
        **SWITCHED_OFF,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "src")]).lstrip(os.pathsep),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FLWR_HOME": str(home),
    }


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fed:
    """An operator's and the sites' folders, and the programs that run in them."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe, self.port = folder, recipe, free_port()
        self.out, self.files = folder / "run", Certificates(folder / "fed")
        self.home = folder / "home"
        self.sites: dict[str, subprocess.Popen[bytes]] = {}

    def prepared(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A verb that prepares the federation, without the seconds that the imports take."""
        return florana(*arguments, cwd=self.folder)

    def florana(self, *arguments: str, timeout: float = HANGS) -> subprocess.CompletedProcess[str]:
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

    def serve(self, *options: str, timeout: float = HANGS) -> subprocess.CompletedProcess[str]:
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
            done = fed.prepared(*arguments)
            assert done.returncode == 0, done.stdout + done.stderr
        for name in names if join else []:
            fed.join(name, "--stay")  # servers come and go
        yield fed
    finally:
        for process in fed.sites.values():
            process.terminate()
        for process in fed.sites.values():
            process.wait(HANGS)
        end_all(folder)


@contextmanager
def simulation(home: Path, own: dict[str, str]) -> Iterator[Path]:
    """A SuperLink that simulates, on a port of its own and in the environment `own`: `flwr run APP own`; its log.

    The one that Flower starts by itself has a port that is the same for everybody on the machine.
    """
    port, log = free_port(), home / "superlink.log"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    options = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    program = Path(sys.executable).with_name("flower-superlink")
    path = os.pathsep.join([str(program.parent), os.environ.get("PATH", "")])  # Flower's programs start one another
    with log.open("ab") as stream:
        child = subprocess.Popen(
            [str(program), *options, "--disable-runtime-dependency-installation"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, **SWITCHED_OFF, **own},
            cwd=home,
            start_new_session=True,
        )
    try:
        assert wait_for(lambda: child.poll() is not None or listens(port)), "the SuperLink does not listen"
        assert child.poll() is None, log.read_text()[-2000:]
        yield log
    finally:
        child.terminate()
        child.wait(HANGS)
        end_all(home)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
