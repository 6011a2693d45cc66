"""The server's front door: the one port that the network sees.

A SuperLink serves on one port what nodes need and what operators need, and lets everyone who reaches the port submit
programs. So the SuperLink listens on this machine alone, and this door passes on the nodes' requests and nothing else,
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
HELD_SECONDS = 2.5
"""How long a node that asks for work is held where there is none: an idle node asks again only after three seconds."""
_ASKED_AGAIN = 0.2

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


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
        inside: the SuperLink's address on this machine, as a URL. limit: bytes of one answer of a node.
        trust: what the SuperLink's certificate is checked by.
    """

    inside: str
    limit: int
    trust: ssl.SSLContext
    traffic: Traffic = field(default_factory=Traffic)
    _client: list[httpx.AsyncClient] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
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
        held = HELD_SECONDS if scope["path"].endswith(_ASKS_FOR_WORK) else 0.0
        try:
            answer = await self._answer(scope["path"], headers, body, held)
        except httpx.HTTPError:
            await _short(send, 503, b"the SuperLink does not answer")
            return
        try:
            kept = [(name, value) for name, value in answer.headers.raw if name.lower() not in _HOP_BY_HOP]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
            async for part in answer.aiter_raw():
                self.traffic.down[node] += len(part)
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    async def _answer(self, path: str, headers: list[tuple[bytes, bytes]], body: bytes, held: float) -> httpx.Response:
        """The SuperLink's answer; where it is empty, asked for again for as long as the node may be held."""
        until = asyncio.get_running_loop().time() + held
        while True:
            request = self._client[0].build_request("POST", self.inside + path, headers=headers, content=body)
            answer = await self._client[0].send(request, stream=True)
            empty = answer.status_code == 200 and answer.headers.get("content-length") == "0"
            if not empty or asyncio.get_running_loop().time() >= until:
                return answer
            await answer.aclose()
            await asyncio.sleep(_ASKED_AGAIN)

    async def _body(self, node: str, receive: Receive) -> bytes:
        content = bytearray()
        async for part in _parts(receive):
            self.traffic.up[node] += len(part)
            self.traffic.answer[node] += len(part)
            if self.traffic.answer[node] > self.limit + _SPARE:
                raise TooMuch
            content += part
        return bytes(content)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._client.append(httpx.AsyncClient(verify=self.trust, timeout=120.0))
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._client.pop().aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return


@dataclass(frozen=True, eq=False)
class OpenDoor:
    """A door that is being served, in a thread."""

    door: Door
    server: uvicorn.Server
    thread: threading.Thread

    def close(self) -> None:
        """Stop serving."""
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
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=3,
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


async def _short(send: Send, status: int, text: bytes) -> None:
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),  # what is left of a request that was refused is not waited for
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
