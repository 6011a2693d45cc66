"""Programs that a model wrote, run against their tests in a process of their own: sandboxed, limited, ended in time.

What always holds: a fresh folder, an environment without the caller's variables, limits on time, memory, file size,
open files and processes, and nothing of a program's output kept. What the kernel adds, each verdict names: no network;
no other process begun, signalled or looked into; no file outside the folder written. Linux gives all three by seccomp
and Landlock (6.2 and later, x86_64 and aarch64), and again by namespaces where a user may make them, which also put
the folder into memory, so that the disk cannot be filled. Where a barrier is missing, as on macOS, Python's own doors
are shut instead, and root is refused.

What does not hold: a program can read what the user can read (it has no way to send it), and one written to deceive
*this* harness, inside one Python process, could claim to pass. This guards against what models write, not against an
attacker.
"""

from __future__ import annotations

import ast
import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from florana.errors import InputError
from florana.score import sandbox
from florana.score.sandbox import BARRIERS

Reason = Literal["passed", "failed", "error", "unfinished", "timeout", "memory", "files"]
"""failed: an assertion. error: any other exception or signal. unfinished: the program ended before its tests did."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: by the clock.
        cpu_seconds: of processor time, whole seconds.
        memory_mib: address space.
        file_mib: of one file, and of all files where the folder is in memory.
        open_files: files open at once, the interpreter's own among them.
    """

    seconds: float = 15.0
    cpu_seconds: int = 5
    memory_mib: int = 1024
    file_mib: int = 16
    open_files: int = 64


STANDARD = Limits()


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Args:
        passed: every test ran to its end.
        reason: why not, or `passed`.
        detail: the exception, signal or limit.
        barriers: those of `BARRIERS` that the kernel held.
    """

    passed: bool
    reason: Reason
    detail: str = ""
    barriers: tuple[str, ...] = ()


def run_program(program: str, tests: str, limits: Limits = STANDARD, *, namespaces: bool = True) -> Verdict:
    """Run a program, then its tests in the same module; it has passed when the tests have run to their end.

    A token that the tests' end alone writes decides: neither `os._exit(0)` nor a printed text can stand for it. Set
    `namespaces` to False to do without the kernel's barriers, as on a system that refuses them.

    Raises:
        InputError: this system has no POSIX processes, or root asks and the kernel holds not every barrier.

    Examples:
        >>> run_program("def double(x): return 2 * x", "assert double(3) == 6").reason
        'passed'
        >>> run_program("def double(x): return x + 3", "assert double(3) == 6\\nassert double(1) == 2").detail
        'AssertionError:  (line 2 of the tests)'
        >>> run_program("import os; os._exit(0)", "").reason
        'unfinished'
    """
    if os.name != "posix":
        raise InputError("programs can be run on Linux and macOS only", why="the limits are those of POSIX processes")
    token = secrets.token_hex(32)
    parts = [program.encode("utf-8", "replace"), tests.encode("utf-8", "replace")]
    with (
        tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as control,
    ):
        drop = os.geteuid() == 0 and _readable_by_all()
        if drop:
            os.chown(folder, sandbox.NOBODY, sandbox.NOBODY)
        control.write(b"".join(parts) + token.encode())
        control.flush()
        reader, writer = os.pipe()
        try:
            settings = {
                "folder": folder,
                "control": control.fileno(),
                "result": writer,
                "program": len(parts[0]),
                "tests": len(parts[1]),
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_mib * 2**20,
                "file_bytes": limits.file_mib * 2**20,
                "open_files": limits.open_files,
                "namespaces": namespaces,
                "drop": drop,
            }
            said = _watch(settings, reader, limits.seconds, token)
        finally:
            os.close(reader)
    return _verdict(said, token, limits)


def run_programs(
    pairs: Iterable[tuple[str, str]],
    limits: Limits = STANDARD,
    *,
    workers: int | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """The verdicts of many (program, tests), in their order; as many at once as there are cores, or `workers`."""

    def one(pair: tuple[str, str]) -> Verdict:
        verdict = run_program(*pair, limits)
        done()
        return verdict

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(one, pairs))


def _watch(settings: Mapping[str, Any], reader: int, seconds: float, token: str) -> bytes:
    """What the process said until it ended, told the token, said too much or used up its time; then it is killed."""
    writer, control = settings["result"], settings["control"]
    try:
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", sandbox.__file__, repr(dict(settings))],
            cwd=settings["folder"],
            # Not -I, which ignores the hash seed: with it, sets of strings have one order and verdicts do not vary.
            # One thread: numpy begins its threads on import, and a program may have none.
            env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer, control),
            start_new_session=True,
        )
    finally:
        os.close(writer)
    said, deadline = b"", time.monotonic() + seconds
    try:
        while len(said) < 2**16 and token.encode() not in said:
            ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return said + b"\n{'late': True}\n"
            more = os.read(reader, 2**14)
            if not more:
                break
            said += more
        return said
    finally:
        with contextlib.suppress(ProcessLookupError):  # the leader is not yet reaped, so the group is still its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _verdict(said: bytes, token: str, limits: Limits) -> Verdict:
    facts: dict[str, Any] = {}
    for line in said.decode("ascii", "replace").splitlines():
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            read = ast.literal_eval(line) if line.startswith("{") and len(line) < 4096 else {}
            if isinstance(read, dict):
                facts = {**read, **facts}  # the first word counts: the harness speaks before the program
    if facts.get("refused"):
        missing = ", ".join(name for name in BARRIERS if name not in facts["barriers"])
        raise InputError(
            "programs written by a model are not run by root here",
            why=f"the kernel leaves these open to them: {missing}",
            fix="run as a user without special rights",
        )
    told = facts.get("barriers")
    barriers = tuple(name for name in BARRIERS if isinstance(told, list) and name in told)
    if token.encode() in said:
        return Verdict(True, "passed", "", barriers)
    status, cpu = facts.get("status"), facts.get("cpu")
    if facts.get("reason") in get_args(Reason) and facts["reason"] != "passed":
        return Verdict(False, facts["reason"], str(facts.get("detail", "")), barriers)
    if "late" in facts:
        return Verdict(False, "timeout", f"not done after {limits.seconds:g} s", barriers)
    if isinstance(status, int) and status < 0:
        if isinstance(cpu, float) and cpu > limits.cpu_seconds - 0.5 and -status in (signal.SIGKILL, signal.SIGXCPU):
            return Verdict(False, "timeout", f"used {limits.cpu_seconds} s of processor time", barriers)
        return Verdict(False, "error", f"ended by {signal.Signals(-status).name}", barriers)
    code = f"exit code {status}" if status is not None else "without a word"
    return Verdict(False, "unfinished", f"ended before its tests were done ({code})", barriers)


def _readable_by_all() -> bool:
    """Whether an unprivileged user could read this interpreter's library and florana's script."""
    places = {Path(place).resolve() for place in (sys.prefix, sys.base_prefix, sandbox.__file__)}
    return all(part.stat().st_mode & 0o005 for place in places for part in (place, *place.parents))
