"""A line that fails: a TCP proxy between sites and their server, which drops, delays or falls silent."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

CHUNK = 2**16


@dataclass
class Line:
    """What befalls the chunks on their way, either way.

    Args:
        drops: the chance with which a chunk is lost and its connection broken off.
        silent: the chance with which a connection falls silent at a chunk: open at both ends, and nothing comes.
        delay: seconds that every chunk takes.
        seed: of the chances.
    """

    drops: float = 0.0
    silent: float = 0.0
    delay: float = 0.0
    seed: int = 0
    broken: int = 0
    silenced: int = 0
    chunks: int = 0
    _rng: random.Random = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def carry(self, here: socket.socket, there: socket.socket) -> None:
        """Forward one way until an end closes, or the line fails."""
        silent = False
        with contextlib.suppress(OSError):
            while chunk := here.recv(CHUNK):
                if silent:
                    continue
                time.sleep(self.delay)
                with self._lock:
                    self.chunks += 1
                    if self._rng.random() < self.drops:
                        self.broken += 1
                        break
                    if self._rng.random() < self.silent:
                        self.silenced += 1
                        silent = True
                        continue
                there.sendall(chunk)
        for end in (here, there):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(port: int, server: int, line: Line) -> Iterator[None]:
    """Stand at `port` of this machine, before the server's.

    Args:
        port: where the sites knock.
        server: where the server listens; while it does not, connections end at once.
        line: what befalls them.
    """
    ends: list[socket.socket] = []

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                site, _ = listener.accept()
                try:
                    behind = socket.create_connection(("127.0.0.1", server), 10)
                except OSError:
                    site.close()
                    continue
                ends.extend((site, behind))
                for pair in ((site, behind), (behind, site)):
                    threading.Thread(target=line.carry, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", port), reuse_port=False) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        try:
            yield
        finally:
            listener.close()
            for end in ends:
                end.close()
