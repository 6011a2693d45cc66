"""A process that has Flower's client program loaded and forks for every message.

Flower starts `flwr-clientapp` afresh for each message, and that program imports for one to two seconds before it does
anything: most of a round that trains for a short time. A fork of a loaded process does the same work at once. The
program is the same, its arguments and environment are those that Flower gave it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from florana.flower import hand_over
from florana.flower.processes import program, start
from florana.flower.trainer import is_own_user

PROGRAM = "flwr-clientapp"


@contextmanager
def starter(log: Path, environment: Mapping[str, str]) -> Iterator[Path | None]:
    """Start such a process; give the folder that belongs at the front of the SuperNode's PATH.

    On Linux only (None elsewhere: programs of other systems' libraries may not survive a fork).

    Args:
        log: where the process and what it forks write. environment: the SuperNode's, beside this process's own.
    """
    if sys.platform != "linux":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="florana-") as folder:  # for this user alone (0700)
        place, own = Path(folder) / "socket", Path(folder) / PROGRAM
        words = [sys.executable, "-I", "-S", hand_over.__file__, str(place), program(PROGRAM)]
        own.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        own.chmod(0o700)
        child = start([Path(sys.executable).name, "-m", "florana.flower.starter", str(place)], log, environment)
        try:
            yield Path(folder)
        finally:
            child.end()


@dataclass(frozen=True)
class Request:
    """What Flower would have started the program with."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def serve_forks(place: Path, run: Callable[[], object]) -> None:
    """Fork for each request at the socket; the child calls `run` with the request's arguments and environment."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: the system buries them
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place))
        place.chmod(0o600)
        listener.listen(32)
        while True:
            channel, _ = listener.accept()
            with channel:
                request = _request(channel)
                if request is None:
                    continue
                if os.fork() == 0:
                    listener.close()
                    channel.close()
                    _become(request, run)
                with contextlib.suppress(OSError):
                    channel.sendall(b"1")


def _request(channel: socket.socket) -> Request | None:
    if not is_own_user(channel):
        return None
    content = bytearray()
    try:
        channel.settimeout(5.0)
        while part := channel.recv(2**16):
            content += part
        said = json.loads(content)
        return Request(tuple(map(str, said["arguments"])), {str(k): str(v) for k, v in said["environment"].items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _become(request: Request, run: Callable[[], object]) -> None:
    """In the child: be the program, then end without going back to the loop."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 1
    try:
        sys.argv = [PROGRAM, *request.arguments]
        os.environ.clear()
        os.environ.update(request.environment)
        random.seed()  # the parent's numbers are every sibling's
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Load Flower's program and florana's part of it, then wait for requests."""
    from flwr.supernode.cli import flwr_clientapp

    import florana.flower.client_app  # noqa: F401  (what every message needs is there before the fork)

    serve_forks(Path(sys.argv[1]), flwr_clientapp)


if __name__ == "__main__":
    main()
