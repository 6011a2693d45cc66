"""The gateway: the one port that the network sees.

It passes the nodes' requests on to Flower's fleet API, which runs in this process (`fleet.py`), and nothing else. A
request is judged by its headers (`signature.py`) before its body is read; of a site's bodies no more than one answer's
bytes are held at once, and a site that sends more than an update can hold is cut off.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from florana.errors import FederationError
from florana.flower.deploy.connections import SECONDS, Waiting, address_of, protocol_with
from florana.flower.deploy.signature import Unknown, Unsigned, signer

PASSED = "/v1/fleet/"
_HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host"}
_BEGINS_AN_ANSWER = "/push-messages"
_ASKS_FOR_WORK = "/pull-messages"
_SENDS_TENSORS = "/push-object"
_SPARE = 2**20
_SMALL = 2**22
"""Bytes of a body that holds no tensors."""
AT_ONCE = 64
"""Requests of one site that are in progress."""
SILENCE = 30.0
"""Seconds in which nothing more of a body comes."""
HEADER_BYTES = 2**14
IDLE = 60
"""Seconds between two requests on one connection."""
HELD_SECONDS = 10.0
"""How long a node that asks for work is held where there is none; it gives up a question after thirty seconds."""
_LOOKS = 0.02
_INSIDE = "http://link"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Stopped(Exception):  # noqa: N818  (a verdict on a request)
    """The rest of a request is not read. Args: the status and the text of the answer; no status: nobody is there."""

    def __init__(self, status: int = 0, text: str = "") -> None:
        super().__init__(text)
        self.status, self.text = status, text


@dataclass
class Traffic:
    """Bytes of the bodies that passed, by client: up to the server, down to the site; of its present answer; held."""

    up: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    down: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    answer: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    held: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    requests: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass(frozen=True, eq=False)
class Door:
    """The ASGI application.

    Args:
        inside: the fleet API, an ASGI application.
        limit: bytes of one answer of a site.
        approved: public key (PEM) -> client.
        asked: counts the requests that were put there: while it stays, there is nothing new for a node that waits.
        traffic: counts the bytes that pass.
        waiting: the requests that wait for an answer, and how many may.
        closing: set when the server ends, so that nodes that wait are answered.
    """

    inside: Application
    limit: int
    approved: Mapping[bytes, str]
    asked: Callable[[], int] = lambda: 0
    traffic: Traffic = field(default_factory=Traffic)
    waiting: Waiting = field(default_factory=Waiting)
    closing: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith(PASSED):
            await _short(send, 404, b"this port is for the nodes of a federation only")
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            client = signer(scope["headers"], self.approved)
        except Unsigned:
            await _short(send, 401, b"the signature does not hold")
            return
        except Unknown:
            await _short(send, 412, b"the key is not approved")
            return
        self.waiting.proved(address_of(scope))
        if self.traffic.requests[client] >= AT_ONCE:
            await _short(send, 429, b"too many requests of one site at once")
            return
        self.traffic.requests[client] += 1
        try:
            await self._pass_on_of(client, scope, receive, send)
        except Stopped as end:
            if end.status:
                await _short(send, end.status, end.text.encode())
        finally:
            self.traffic.requests[client] -= 1

    async def _pass_on_of(self, client: str, scope: Scope, receive: Receive, send: Send) -> None:
        if any(name.lower() == b"content-encoding" for name, _ in scope["headers"]):
            raise Stopped(415, "bodies are taken as they are")
        if scope["path"].endswith(_BEGINS_AN_ANSWER):
            self.traffic.answer[client] = 0
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP_BY_HOP]
        held = _Held(self.traffic, client)
        try:
            body = await self._body(client, scope["path"], receive, held)
            gone = asyncio.ensure_future(receive())
            try:
                answer = await self._answer(scope["path"], headers, body, gone)
            finally:
                gone.cancel()
        finally:
            held.let_go()
        kept = [(name, value) for name, value in answer.headers.raw if name.lower() not in _HOP_BY_HOP]
        self.traffic.down[client] += len(answer.content)
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

    async def _body(self, client: str, path: str, receive: Receive, held: _Held) -> bytes:
        """The whole body. Raises Stopped where it is too long, its sender falls silent, or leaves."""
        content, most = bytearray(), self.limit + _SPARE
        own = most if path.endswith(_SENDS_TENSORS) else min(most, _SMALL)
        async for part in _parts(receive):
            self.traffic.up[client] += len(part)
            self.traffic.answer[client] += len(part)
            held.more(len(part))
            if len(content) + len(part) > own or self.traffic.answer[client] > most or self.traffic.held[client] > most:
                raise Stopped(413, f"an answer may have {self.limit} bytes")
            content += part
        return bytes(content)


@dataclass(eq=False)
class _Held:
    """Bytes of one request that are in memory."""

    traffic: Traffic
    client: str
    size: int = 0

    def more(self, size: int) -> None:
        self.size += size
        self.traffic.held[self.client] += size

    def let_go(self) -> None:
        self.traffic.held[self.client] -= self.size
        self.size = 0


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
        http=protocol_with(door.waiting),
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=IDLE,
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
    loop = asyncio.get_running_loop()  # the gateway's alone; uvicorn has no setting for the handshake
    loop.create_server = functools.partial(loop.create_server, ssl_handshake_timeout=SECONDS)  # type: ignore[method-assign]
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


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        try:
            message = await asyncio.wait_for(receive(), SILENCE)
        except TimeoutError:
            raise Stopped(408, "nothing more came") from None
        if message["type"] != "http.request":
            raise Stopped
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
