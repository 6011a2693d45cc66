"""What a site puts before Flower's own programs on the SuperNode's PATH.

`flwr-clientapp` becomes `florana.flower.held`, which runs no code of the server. Every other program that a SuperNode
could start to run a server's code (`flwr-agentapp` and its like) is refused. On Linux a process has the client program
loaded and forks for every message: Flower starts it afresh for each, and its imports take one to two seconds, most of a
round that trains for a short time.
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
from florana.flower.held import hold, holdable
from florana.flower.processes import start
from florana.flower.trainer import is_own_user

PROGRAM = "flwr-clientapp"


@contextmanager
def site_programs(log: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """The folder that belongs at the front of the SuperNode's PATH, and the process that has the program loaded.

    Args:
        log: where the process and what it forks write. environment: the SuperNode's, beside this process's own.

    Raises:
        RecipeError: this version of Flower cannot be held to the installed code.
    """
    holdable()
    held = [sys.executable, "-m", "florana.flower.held"]
    with tempfile.TemporaryDirectory(prefix="florana-") as folder:  # for this user alone (0700)
        place = Path(folder) / "socket"
        forks = sys.platform == "linux"  # libraries of other systems may not survive a fork
        words = [sys.executable, "-I", "-S", hand_over.__file__, str(place), json.dumps(held)] if forks else held
        _script(Path(folder) / PROGRAM, f'exec {shlex.join(words)} "$@"')
        for other in Path(sys.executable).parent.glob("flwr-*"):
            if other.name != PROGRAM:
                _script(Path(folder) / other.name, f"echo 'florana: a site runs no {other.name}' >&2; exit 1")
        if not forks:
            yield Path(folder)
            return
        child = start([Path(sys.executable).name, "-m", "florana.flower.site_programs", str(place)], log, environment)
        try:
            yield Path(folder)
        finally:
            child.end()


def _script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    path.chmod(0o700)


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
    """Load Flower's program, held, and florana's part of it, then wait for requests."""
    hold()
    from flwr.supernode.cli import flwr_clientapp

    import florana.flower.client_app  # noqa: F401  (what every message needs is there before the fork)

    serve_forks(Path(sys.argv[1]), flwr_clientapp)


if __name__ == "__main__":
    main()
