"""A site in a process of its own that a test can kill, asked over a local socket instead of a network."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from florana.flower.app.frames import Frame, from_head

_SIZES = struct.Struct(">QQ")


@dataclass(frozen=True, eq=False)
class Listener:
    """An open socket and the way to it."""

    channel: socket.socket
    path: Path


@contextmanager
def listening() -> Iterator[Listener]:
    with tempfile.TemporaryDirectory(prefix="florana-") as folder:
        path = Path(folder) / "trainer"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.bind(str(path))
            channel.listen(8)
            channel.settimeout(0.5)
            yield Listener(channel, path)


def answer_until(listener: Listener, answer: Callable[[Frame], Frame], done: threading.Event) -> None:
    """Answer requests until `done` is set, one at a time."""
    while not done.is_set():
        try:
            channel, _ = listener.channel.accept()
        except TimeoutError:
            continue
        with channel, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            channel.settimeout(None)
            if (frame := receive(channel)) is not None:
                send(channel, answer(frame))


def send(channel: socket.socket, frame: Frame) -> None:
    head = frame.head().encode()
    channel.sendall(_SIZES.pack(len(head), len(frame.payload)) + head + frame.payload)


def receive(channel: socket.socket) -> Frame | None:
    """One frame; None where the other side has closed."""
    first = channel.recv(1)
    if not first:
        return None
    head, payload = _SIZES.unpack(first + _exactly(channel, _SIZES.size - 1))
    return from_head(_exactly(channel, head).decode(), _exactly(channel, payload))


def _exactly(channel: socket.socket, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        part = channel.recv(min(count - len(content), 2**20))
        if not part:
            raise ConnectionResetError("the other side ended in the middle of a message")
        content += part
    return bytes(content)
