"""`florana` as a process: started from nothing, or, much faster, forked from one that has the libraries loaded."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["pytest", "florana.cli", "florana.run", "florana.merge", "florana.inspection", "florana.study.work"]
)


def started(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    return subprocess.run([sys.executable, "-m", "florana", *arguments], cwd=cwd, capture_output=True, text=True)


def florana(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The same, without the seconds that the imports take."""
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder) / "out", Path(folder) / "error"
        process = _FORKS.Process(target=_be_florana, args=(arguments, str(cwd), str(out), str(error)))
        process.start()
        process.join()
        said = out.read_text(), error.read_text()
        return subprocess.CompletedProcess(arguments, process.exitcode or 0, *said)


def _be_florana(arguments: tuple[str, ...], cwd: str, out: str, error: str) -> None:
    for number, path in ((1, out), (2, error)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    sys.argv = ["florana", *arguments]
    from florana.cli import main

    main()
