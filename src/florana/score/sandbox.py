"""The inside of `programs`: the script that a fresh interpreter runs to shut itself in and then run one program.

Started as `python -s -P -B sandbox.py SETTINGS`; imports nothing of florana. Two processes: the outer one leaves the
machine's namespaces and waits; the inner one, the first of its process namespace, closes the rest behind itself
(mounts, Landlock, limits, seccomp: https://docs.kernel.org/userspace-api/) and runs the program. When it ends, the
kernel ends everything it started.
"""

from __future__ import annotations

import ast
import ctypes
import os
import resource
import signal
import struct
import sys
import types
from typing import Any

_USER, _NET, _MOUNT, _PID, _IPC = 0x10000000, 0x40000000, 0x00020000, 0x20000000, 0x08000000
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38  # of prctl
_MOUNT_SETATTR, _HERE, _RECURSIVE = 442, -100, 0x8000  # these system calls' numbers are the same everywhere
_READ_ONLY_NO_SUID, _PRIVATE = 3, 1 << 18
_RULESET, _RULE, _RESTRICT = 444, 445, 446  # of Landlock
_WRITING = 0b111111111110010  # every Landlock right but execute, read file, read folder; up to truncate (version 3)
_CAPABILITIES_3 = 0x20080522
_COMMON = (424, 425, 428, 429, 430, 432, 434, 435, 442, 452)  # pidfd, io_uring, mounts, clone3, fchmodat2
_DENIED = {  # machine -> its audit number; clone fork exec, signals, socket, tracing, namespaces, mounts, limits, modes
    "x86_64": (0xC000003E, "41 56 57 58 59 62 90 91 92 93 94 101 129 155 161 165 166 200 234 248 249 250 260 268 "
        "272 297 298 302 308 310 311 321 322 323"),
    "aarch64": (0xC00000B7, "39 40 41 51 52 53 54 55 97 117 129 130 131 138 198 217 218 219 220 221 240 241 261 "
        "268 270 271 280 281 282"),
}  # fmt: skip
NOBODY = 65534
HIDDEN = ("/proc", "/run")
"""Other processes' environments, and the sockets of the machine's services."""
BARRIERS = ("network", "processes", "files")
"""What the kernel can close: the network, other processes (begun, signalled), files outside the folder (written)."""


def main(settings: dict[str, Any]) -> None:
    """Enter the sandbox, run, report. The last thing written to the result pipe after the tests is the token."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    root = os.geteuid() == 0 and not settings["drop"]
    if settings["drop"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    held: set[str] = set()
    if libc is not None:
        libc.prctl(_DUMPABLE, 1, 0, 0, 0)
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if settings["namespaces"]:
            held |= _leave(libc)
    child = os.fork()
    if child == 0:
        try:
            if libc is not None:
                held |= _shut(libc, settings, bool(held))
            _say(settings, {"barriers": sorted(held), "refused": root and held != set(BARRIERS)})
            if not root or held == set(BARRIERS):  # what root may do, no program may do unguarded
                _guard(held)
                _run(settings)
        finally:
            os._exit(0)
    _, status, usage = os.wait4(child, 0)
    _say(settings, {"status": os.waitstatus_to_exitcode(status), "cpu": usage.ru_utime + usage.ru_stime})
    os._exit(0)


def _leave(libc: Any) -> set[str]:
    """New user, network, mount, process and message namespaces, the user mapped to itself; nothing where refused."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(_USER | _NET | _MOUNT | _PID | _IPC) != 0:
        return set()
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - pathlib costs its import in every program
                file.write(text)
    except OSError:
        pass  # then the mounts below fail, and Landlock stands alone
    return {"network", "processes"}


def _shut(libc: Any, settings: dict[str, Any], away: bool) -> set[str]:
    """Everything the kernel offers, in the order in which each step still may be taken; then the limits."""
    held = set()
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    mounted = away and _mount(libc, settings["folder"], settings["file_bytes"])
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.capset((ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)())  # nothing can be unmounted
    if _landlock(libc, settings["folder"]) or mounted:
        held.add("files")
    _limit(settings)
    if _seccomp(libc):
        held |= {"network", "processes"}
    return held


def _mount(libc: Any, folder: str, size: int) -> bool:
    """Everything read-only, a small folder in memory at `folder`, other processes out of sight. False where refused."""
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NO_SUID, 0, _PRIVATE, 0)
    if libc.syscall(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, ctypes.byref(attributes), 32) != 0:
        return False
    for place, options in ((folder, f"size={size},nr_inodes=1024,mode=700"), *((p, "size=4k") for p in HIDDEN)):
        if os.path.isdir(place) and libc.mount(b"none", place.encode(), b"tmpfs", 6, options.encode()) != 0:  # noqa: PTH112
            return False
    os.chdir(folder)
    return True


def _landlock(libc: Any, folder: str) -> bool:
    """Writing below `folder` (and to /dev/null) only; tracing and other processes' environments are closed too."""
    if libc.syscall(_RULESET, None, 0, 1) < 3:  # the version; earlier ones leave truncation open
        return False
    handled = ctypes.c_uint64(_WRITING)
    rules = libc.syscall(_RULESET, ctypes.byref(handled), 8, 0)
    for place, rights in ((folder, _WRITING), ("/dev/null", 2)):
        opened = os.open(place, os.O_PATH)
        rule = struct.pack("=Qi", rights, opened)
        if libc.syscall(_RULE, rules, 1, rule, 0) != 0:
            return False
        os.close(opened)
    closed = bool(libc.syscall(_RESTRICT, rules, 0) == 0)
    os.close(rules)
    return closed


def _seccomp(libc: Any) -> bool:
    """No socket, process, thread, signal, tracing, mount: the calls answer EPERM. False where not known."""
    if os.uname().machine not in _DENIED:
        return False
    audit, numbers = _DENIED[os.uname().machine]
    # load the architecture; another one, or the x32 numbers, are no way around; load the number; deny; allow
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000)]
    code.append((0x06, 0, 0, 0x00050001))
    for number in (*map(int, numbers.split()), *_COMMON):
        code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050001)]
    code.append((0x06, 0, 0, 0x7FFF0000))
    rules = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = struct.pack("HP", len(code), ctypes.addressof(rules))
    return bool(libc.prctl(_SECCOMP, 2, program, 0, 0) == 0)


def _limit(settings: dict[str, Any]) -> None:
    for name, value in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", settings["cpu_seconds"]),
        ("RLIMIT_FSIZE", settings["file_bytes"]),
        ("RLIMIT_NOFILE", settings["open_files"]),
        ("RLIMIT_AS", settings["memory_bytes"]),
        ("RLIMIT_NPROC", 1),  # this one: no further process or thread
    ):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):  # below what is in use, or not known to this system
            if name != "RLIMIT_AS":
                raise


def _guard(held: set[str]) -> None:
    """Where the kernel closes nothing, Python's own names for it are taken away: against accidents, no more."""

    def refuse(*arguments: object, **options: object) -> object:
        raise PermissionError("closed to programs under test")

    if "network" not in held:
        import _socket
        import socket

        for module in (_socket, socket):
            for name in ("socket", "socketpair", "create_connection", "getaddrinfo", "fromfd", "SocketType"):
                if hasattr(module, name):
                    setattr(module, name, refuse)
    if "processes" not in held:
        for name in ("kill", "killpg", "fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "setsid"):
            setattr(os, name, refuse)
        signal.pthread_kill = refuse  # type: ignore[assignment]


def _run(settings: dict[str, Any]) -> None:
    """The program, then its tests, in one module; the token is read when they are done."""
    module = types.ModuleType("program")  # not __main__: what stands under that condition is not run, as in the field
    sys.modules["program"] = module
    place = 0
    try:
        for name in ("program", "tests"):
            source = os.pread(settings["control"], settings[name], place).decode()
            place += settings[name]
            exec(compile(source, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
        os.write(settings["result"], b"\n" + os.pread(settings["control"], 64, place) + b"\n")
    except BaseException as error:
        _say(settings, {"reason": _reason(error), "detail": _detail(error)})


def _reason(error: BaseException) -> str:
    if isinstance(error, AssertionError):
        return "failed"
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, SystemExit):
        return "unfinished"
    return "files" if isinstance(error, OSError) and error.errno in (27, 28) else "error"  # too large, no space left


def _detail(error: BaseException) -> str:
    where, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            where = f" (line {trace.tb_lineno} of the tests)"
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:200]}{where}"


def _say(settings: dict[str, Any], message: dict[str, Any]) -> None:
    os.write(settings["result"], b"\n" + repr(message).encode("ascii", "backslashreplace") + b"\n")


if __name__ == "__main__":
    main(ast.literal_eval(sys.argv[1]))
