"""`florana` as a process: started from nothing, or, much faster, forked from one that has the libraries loaded."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.strikes import strike

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "pytest",
        "florana.cli.main",
        "florana.runs.setup",
        "florana.train.predict",
        "florana.adapters.merge",
        "florana.adapters.inspect",
        "florana.study.runner",
        "florana.flower.app.server_app",  # where Flower is installed
        "florana.flower.deploy.doctor",
    ]
)


HANGS = 900.0
"""Seconds after which a program is taken to hang, however busy the machine."""


def started(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    return subprocess.run([sys.executable, "-m", "florana", *arguments], cwd=cwd, capture_output=True, text=True)


def florana(
    *arguments: str, cwd: Path = ROOT, killed_at: tuple[Path, int] | None = None, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """The same, without the seconds that the imports take.

    Args:
        typed: what stands on its standard input.
        killed_at: a folder and a step in it, counted from the first commit on, at which the program ends by SIGKILL.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, error, told = (Path(folder) / name for name in ("out", "error", "told"))
        given = (arguments, str(cwd), str(out), str(error), killed_at, str(told), typed)
        process = _FORKS.Process(target=_be_florana, args=given)
        process.start()
        process.join()
        said = out.read_text(), error.read_text()
        return subprocess.CompletedProcess(arguments, process.exitcode or 0, *said)


def begun(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A function of the tests in a process of its own."""
    process = _FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def struck(
    target: Callable[..., Any], arguments: tuple[Any, ...], folder: Path, step: int, committing: bool = True
) -> bool:
    """The same to its end; whether it was killed at that step below the folder (see `strike`)."""
    process = begun(_be_struck, target, arguments, str(folder), step, committing)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _be_struck(
    target: Callable[..., Any], arguments: tuple[Any, ...], folder: str, step: int, committing: bool
) -> None:
    strike(folder, step, f"{folder}.told", committing)
    target(*arguments)


def _be_florana(
    arguments: tuple[str, ...],
    cwd: str,
    out: str,
    error: str,
    killed_at: tuple[Path, int] | None,
    told: str,
    typed: str,
) -> None:
    for number, path in ((1, out), (2, error)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = io.StringIO(typed)
    os.chdir(cwd)
    sys.argv = ["florana", *arguments]
    from florana.cli.main import main

    if killed_at is not None:
        strike(str(killed_at[0]), killed_at[1], told)
    main()


def wait_for(what: Callable[[], bool], seconds: float = HANGS) -> bool:
    """Whether it came true within that time."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
