"""`florana` as a process: started from nothing, or, much faster, forked from one that has the libraries loaded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.strikes import strike

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["pytest", "florana.cli", "florana.run", "florana.merge", "florana.inspection", "florana.study.work"]
)


def started(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    return subprocess.run([sys.executable, "-m", "florana", *arguments], cwd=cwd, capture_output=True, text=True)


def florana(
    *arguments: str, cwd: Path = ROOT, killed_at: tuple[Path, int] | None = None
) -> subprocess.CompletedProcess[str]:
    """The same, without the seconds that the imports take.

    Args:
        killed_at: a folder and a step in it, counted from the first commit on, at which the program ends by SIGKILL.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, error, told = (Path(folder) / name for name in ("out", "error", "told"))
        given = (arguments, str(cwd), str(out), str(error), killed_at, str(told))
        process = _FORKS.Process(target=_be_florana, args=given)
        process.start()
        process.join()
        said = out.read_text(), error.read_text()
        return subprocess.CompletedProcess(arguments, process.exitcode or 0, *said)


def struck(target: Callable[..., Any], arguments: tuple[Any, ...], folder: Path, step: int) -> bool:
    """Call a function of the tests in a process of its own; whether it was killed at that step of its first commit."""
    process = _FORKS.Process(target=_be_struck, args=(target, arguments, str(folder), step))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _be_struck(target: Callable[..., Any], arguments: tuple[Any, ...], folder: str, step: int) -> None:
    import torch

    torch.set_num_threads(1)
    strike(folder, step, f"{folder}.told")
    target(*arguments)


def _be_florana(
    arguments: tuple[str, ...], cwd: str, out: str, error: str, killed_at: tuple[Path, int] | None, told: str
) -> None:
    for number, path in ((1, out), (2, error)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    sys.argv = ["florana", *arguments]
    from florana.cli import main

    if killed_at is not None:
        strike(str(killed_at[0]), killed_at[1], told)
    main()
