"""The server's gateway: the one port that the network sees.

It passes the nodes' requests on to Flower's fleet API, which runs in this process (`link.py`), and nothing else; it
counts their bytes, and cuts off a node that sends more than an update can hold.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from florana.errors import FederationError

PASSED = "/v1/fleet/"
_KEY_HEADER = b"flwr-public-key"
_HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host"}
_BEGINS_AN_ANSWER = "/push-messages"
_ASKS_FOR_WORK = "/pull-messages"
_SPARE = 2**20
HELD_SECONDS = 10.0
"""How long a node that asks for work is held where there is none; it gives up a question after thirty seconds."""
_LOOKS = 0.02
_INSIDE = "http://link"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class TooMuch(Exception):  # noqa: N818  (a verdict on a request)
    """The node has sent more bytes than one answer may have."""


@dataclass
class Traffic:
    """Bytes of the bodies that passed, by node (a short digest of its key): up to the server, down to the node."""

    up: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    down: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    answer: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass(frozen=True, eq=False)
class Door:
    """The ASGI application.

    Args:
        inside: the fleet API, an ASGI application.
        limit: bytes of one answer of a node.
        asked: counts the requests that were put there: while it stays, there is nothing new for a node that waits.
        traffic: counts the bytes that pass.
        closing: set when the server ends, so that nodes that wait are answered.
    """

    inside: Application
    limit: int
    asked: Callable[[], int] = lambda: 0
    traffic: Traffic = field(default_factory=Traffic)
    closing: threading.Event = field(default_factory=threading.Event)
    """Set when nobody is held any more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith(PASSED):
            await _short(send, 404, b"this port is for the nodes of a federation only")
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        node = _node(scope["headers"])
        if scope["path"].endswith(_BEGINS_AN_ANSWER):
            self.traffic.answer[node] = 0
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP_BY_HOP]
        try:
            body = await self._body(node, receive)
        except TooMuch:
            await _short(send, 413, f"an answer may have {self.limit} bytes".encode())
            return
        gone = asyncio.ensure_future(receive())
        try:
            answer = await self._answer(scope["path"], headers, body, gone)
        finally:
            gone.cancel()
        kept = [(name, value) for name, value in answer.headers.raw if name.lower() not in _HOP_BY_HOP]
        self.traffic.down[node] += len(answer.content)
        await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
        await send({"type": "http.response.body", "body": answer.content})

    async def _answer(
        self, path: str, headers: list[tuple[bytes, bytes]], body: bytes, gone: asyncio.Future[Any]
    ) -> httpx.Response:
        """The fleet API's answer. A node that asks for work is held where there is none, unless it is `gone`."""
        clock = asyncio.get_running_loop().time
        until = clock() + (HELD_SECONDS if path.endswith(_ASKS_FOR_WORK) else 0.0)
        transport = httpx.ASGITransport(app=self.inside, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=_INSIDE) as client:
            while True:
                seen = self.asked()
                answer = await client.post(path, headers=headers, content=body)
                if answer.status_code != 200 or answer.content:
                    return answer
                while self.asked() == seen:
                    if clock() >= until or gone.done() or self.closing.is_set():
                        return answer
                    await asyncio.sleep(_LOOKS)

    async def _body(self, node: str, receive: Receive) -> bytes:
        content = bytearray()
        async for part in _parts(receive):
            self.traffic.up[node] += len(part)
            self.traffic.answer[node] += len(part)
            if self.traffic.answer[node] > self.limit + _SPARE:
                raise TooMuch
            content += part
        return bytes(content)


@dataclass(frozen=True, eq=False)
class OpenDoor:
    """A door that is being served, in a thread."""

    door: Door
    server: uvicorn.Server
    thread: threading.Thread

    def close(self) -> None:
        """Stop serving."""
        self.door.closing.set()
        self.server.should_exit = True
        self.thread.join(15)


def open_door(door: Door, host: str, port: int, certificate: Path, key: Path) -> OpenDoor:
    """Serve the door over TLS.

    Raises:
        FederationError: the port cannot be had.
    """
    config = uvicorn.Config(
        door,
        host=host,
        port=port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=1,
        ws="none",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(_serve(server)), name="front door", daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        thread.join(0.05)
    if not server.started:
        raise FederationError(f"the port {port} of {host} cannot be served", fix="is it in use? choose another --port")
    return OpenDoor(door, server, thread)


async def _serve(server: uvicorn.Server) -> None:
    try:
        await server.serve()
    except SystemExit:  # uvicorn's way to say that the port is taken
        return
    for connection in list(server.server_state.connections):  # of sites that are at work, and do not read now
        connection.transport.abort()
    await asyncio.sleep(0)


def trusting(authority: Path) -> ssl.SSLContext:
    """A context that trusts this authority and no other."""
    return ssl.create_default_context(cafile=str(authority))


def _node(headers: list[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name.lower() == _KEY_HEADER:
            return hashlib.sha256(value).hexdigest()[:12]
    return "unknown"


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def _short(send: Send, status: int, text: bytes) -> None:
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),  # what is left of a request that was refused is not waited for
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
