"""The resident trainer: it holds the base model while Flower starts and ends a process for every message.

It listens on a socket of the file system, in a folder that only its own user can enter, and answers one request after
the other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from florana.flower.frames import Frame, receive, send

log = logging.getLogger("florana")
REQUEST_LIMIT = 2**33
"""Bytes of one request of the server."""


@dataclass(frozen=True, eq=False)
class Listener:
    """An open socket and the way to it."""

    channel: socket.socket
    path: Path


@contextmanager
def listening() -> Iterator[Listener]:
    """A socket that only this user's processes reach; removed with its folder at the end.

    A new folder below the system's one for temporary files: a path to a socket may have no more than about 100 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="florana-") as folder:  # mkdtemp: for this user alone (0700)
        path = Path(folder) / "trainer"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.bind(str(path))
            path.chmod(0o600)
            channel.listen(8)
            channel.settimeout(0.5)
            yield Listener(channel, path)


def answer_until(listener: Listener, answer: Callable[[Frame], Frame], done: threading.Event) -> None:
    """Answer requests until `done` is set; one at a time, since there is one model."""
    while not done.is_set():
        try:
            channel, _ = listener.channel.accept()
        except TimeoutError:
            continue
        with channel:
            channel.settimeout(None)
            if not is_own_user(channel):
                log.warning("a request of another user was refused")
                continue
            # the process that asked may be gone by the time the answer is there: the next one will ask
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _one(channel, answer)


def _one(channel: socket.socket, answer: Callable[[Frame], Frame]) -> None:
    try:
        frame = receive(channel, REQUEST_LIMIT)
    except (ValueError, RecursionError) as error:
        send(channel, Frame("failure", {"reason": f"its trainer could not read the request: {error}"}))
        return
    if frame is not None:
        send(channel, answer(frame))


def is_own_user(channel: socket.socket) -> bool:
    """Whether the other end is a process of this user; where the system does not tell, the folder kept others out."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return True
    _, user, _ = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    return int(user) == os.getuid()
