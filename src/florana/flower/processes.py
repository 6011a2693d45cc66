"""Flower's own programs as children: telemetry and the like switched off, ended with whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from florana.errors import FederationError, InputError

SWITCHED_OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What Flower and Ray would tell the world or fetch from it, unless they are told not to."""
SECONDS_TO_END = 10.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, eq=False)
class Child:
    """A running program: its process, and where it writes."""

    process: subprocess.Popen[bytes]
    log: Path

    def running(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def end(self) -> None:
        """End it and everything it started: asked first, killed after ten seconds."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_END)
                if not _group_lives(self.process.pid, 3.0):
                    return

    def tail(self, lines: int = 12) -> str:
        """The last lines it wrote."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def start(command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path | None = None) -> Child:
    """Start one of Flower's programs in a session of its own; its output goes to `log`."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=_environment(environment),
            cwd=folder,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    return Child(process, log)


def call(command: Sequence[str], environment: Mapping[str, str], seconds: float = 120.0) -> str:
    """Run one of Flower's programs to its end and return what it printed.

    Raises:
        FederationError: it failed, or did not end in time.
    """
    try:
        done = subprocess.run(
            [program(command[0]), *command[1:]],
            capture_output=True,
            text=True,
            env=_environment(environment),
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FederationError(f"'{' '.join(command[:3])}' did not end within {seconds:g} seconds") from None
    if done.returncode != 0:
        said = " ".join((done.stderr + done.stdout).split())
        raise FederationError(f"'{' '.join(command[:3])}' failed", why=said[-800:])
    return done.stdout


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **on_path(None), **SWITCHED_OFF, **own}


def on_path(first: Path | None) -> dict[str, str]:
    """PATH with Flower's programs, which start one another by name; those in the folder `first` before all others."""
    folders = [
        *([str(first)] if first is not None else []),
        str(Path(sys.executable).parent),
        os.environ.get("PATH", ""),
    ]
    return {"PATH": os.pathsep.join(folders)}


def program(name: str) -> str:
    """Flower's program of that name: beside this Python first. Raises InputError where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise InputError(
            f"the program '{name}' is not installed", fix="pip install 'florana[flower]' (it brings Flower's programs)"
        )
    return found


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: Callable[[], bool], seconds: float, step: float = 0.1) -> bool:
    """Whether `what` became true within that time."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(step)
    return True


def _group_lives(group: int, seconds: float) -> bool:
    def gone() -> bool:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return True
        return False

    return not until(gone, seconds)


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
