"""A site's programs: the server's code is not run, and a fork of the loaded program is the program."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.errors import RecipeError
from florana.flower import hand_over
from florana.flower.client_app import app
from florana.flower.held import hold
from florana.flower.processes import Child, on_path, start, until
from florana.flower.site_programs import PROGRAM, site_programs
from tests.conftest import ROOT
from tests.deployment import HANGS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the process forks on Linux only")

ECHO = """
import os, sys
from pathlib import Path
from florana.flower.site_programs import serve_forks
def run():
    print("ran", sys.argv, os.environ.get("OWN"), os.environ.get("OF_THE_STARTER"), os.getpid() != MAIN, flush=True)
    if sys.argv[1:] == ["raise"]:
        raise ValueError("its own fault")
    sys.exit(3)
MAIN = os.getpid()
serve_forks(Path(sys.argv[1]), run)
"""


def listens(place: Path) -> bool:
    """Whether somebody answers there: the socket is in its folder a moment before."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        return channel.connect_ex(str(place)) == 0


def handed(place: Path, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-I",
        "-S",
        hand_over.__file__,
        str(place),
        json.dumps([str(program), "held"]),
        *arguments,
    ]
    return subprocess.run(command, env={"OWN": "mine"}, capture_output=True, text=True, check=False, timeout=HANGS)


@pytest.fixture
def itself(tmp_path: Path) -> Path:
    """What is run where no process has the program loaded."""
    path = tmp_path / "itself"
    path.write_text('#!/bin/sh\necho itself "$@"\nexit 7\n')
    path.chmod(0o700)
    return path


def test_a_fork_has_the_arguments_and_the_environment_that_the_caller_gave(tmp_path: Path, itself: Path) -> None:
    script, place = tmp_path / "echo.py", tmp_path / "s"
    script.write_text(ECHO)
    child = start([Path(sys.executable).name, str(script), str(place)], tmp_path / "log", {"OF_THE_STARTER": "x"})
    try:
        assert until(lambda: listens(place), HANGS), child.tail()
        for arguments in (["--token", "a b"], ["raise"], ["again"]):
            done = handed(place, itself, *arguments)
            assert (done.returncode, done.stdout) == (0, ""), "the caller's work is done when the fork is there"
        assert until(lambda: child.tail(40).count("ran ") == 3, HANGS), child.tail(40)
        text = child.tail(40)
        assert f"ran {[PROGRAM, '--token', 'a b']} mine None True" in text
        assert "ValueError: its own fault" in text
        assert _children(child) == [], "what has ended is buried"
    finally:
        child.end()
    assert handed(place, itself, "--token", "t").stdout == "itself held --token t\n", "nobody answers: it runs itself"


def _children(child: Child) -> list[str]:
    def there() -> list[str]:
        return Path(f"/proc/{child.process.pid}/task/{child.process.pid}/children").read_text().split()

    until(lambda: not there(), HANGS)
    return there()


def test_senseless_requests_start_nothing(tmp_path: Path) -> None:
    script, place = tmp_path / "echo.py", tmp_path / "s"
    script.write_text(ECHO)
    child = start([Path(sys.executable).name, str(script), str(place)], tmp_path / "log", {})
    try:
        assert until(lambda: listens(place), HANGS), child.tail()
        for content in (b"", b"no json", b"[1]", b'{"arguments": 3, "environment": {}}', b'{"arguments": []}'):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                channel.connect(str(place))
                channel.sendall(content)
                channel.shutdown(socket.SHUT_WR)
                assert channel.recv(1) == b""
        assert child.tail() == ""
        assert child.running()
    finally:
        child.end()


def test_flowers_own_program_answers_through_it_and_no_other_does(tmp_path: Path) -> None:
    with site_programs(tmp_path / "log", {"FLWR_HOME": str(tmp_path)}) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **on_path(folder)}

        def run(name: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([name, "--help"], env=environment, capture_output=True, text=True, check=False)

        early = run(PROGRAM)
        assert "--runtime-api-address" in early.stdout + (tmp_path / "log").read_text(), "before the process is ready"
        assert until(lambda: listens(folder / "socket"), HANGS), (tmp_path / "log").read_text()
        done = run(PROGRAM)
        assert (done.returncode, done.stdout) == (0, "")
        assert until(lambda: "--runtime-api-address" in (tmp_path / "log").read_text(), HANGS)
        for other in ("flwr-agentapp", "flwr-serverapp", "flwr-model", "flwr-connector", "flwr-simulation"):
            done = run(other)
            assert (done.returncode, done.stdout) == (1, "")
            assert f"a site runs no {other}" in done.stderr
    assert not folder.exists()


def test_the_code_of_an_app_is_neither_unpacked_nor_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    program = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    for name in ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn"):
        monkeypatch.setattr(program, name, getattr(program, name))  # put back afterwards
    assert hold() is program
    program.install_from_fab(b"not even a zip", skip_prompt=True)
    program.install_app_dependencies("/nowhere", launch_id="x")
    load = program.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("evil/app", "1.0.0", "0" * 64) is app
    monkeypatch.delattr(program, "install_from_fab")
    with pytest.raises(RecipeError, match=r"Flower \S+ cannot be held.*\n.*it has no install_from_fab") as refused:
        hold()
    assert "pip install 'florana[flower]'" in refused.value.fix
