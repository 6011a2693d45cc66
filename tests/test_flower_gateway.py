"""The gateway against those who have no key: nothing of theirs is read, kept or waited for; sites are served beside."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from florana.errors import FederationError
from florana.flower.deploy import connections, gateway
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.gateway import Door, Receive, Scope, Send, open_door
from florana.flower.deploy.keys import Certificates, make_site, read_private
from florana.flower.deploy.live_roster import LiveRoster
from florana.flower.deploy.roster import approve, read_roster, revoke
from tests.conftest import ROOT
from tests.deployment import free_port
from tests.program import wait_for

LIMIT = 2**20
PUSH, PULL, OBJECT = "/v1/fleet/push-messages", "/v1/fleet/pull-messages", "/v1/fleet/push-object"
Headers = dict[str, str]


class Inside:
    """What stands in the place of the fleet API: keeps what reaches it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(bytes(body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def signed(key: ec.EllipticCurvePrivateKey, when: float = 0.0) -> Headers:
    """The headers of a node with that key, so many seconds from now."""
    stamp = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=when)).isoformat()
    public, signature = public_key_to_bytes(key.public_key()), sign_message(key, stamp.encode())
    return {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": b64encode(signature).decode(),
    }


class Place:
    def __init__(self, folder: Path) -> None:
        self.port, self.inside = free_port(), Inside()
        self.files: Certificates = make_server(folder / "fed", ["127.0.0.1"])
        make_site(folder / "a", "a")
        approve(self.files, folder / "a" / "a.pub")
        key = load_ssh_private_key(read_private(folder / "a")[1].read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.key, self.stranger = key, ec.generate_private_key(ec.SECP384R1())
        self.door = Door(self.inside, LIMIT, {pem: name for name, pem in read_roster(self.files.roster).keys.items()})

    def connect(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.files.authority))
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 10), server_hostname="127.0.0.1")

    def request(self, head: bytes, *parts: bytes, wait: float = 10.0) -> bytes:
        """What comes back on a connection of its own; empty where it was closed without a word."""
        with self.connect() as line:
            line.settimeout(wait)
            try:
                line.sendall(head)
                for part in parts:
                    line.sendall(part)
                return line.recv(4096)
            except (OSError, ssl.SSLError):
                return b""

    def served(self) -> bool:
        """Whether an approved site gets its answer."""
        return b"200" in self.request(head(PULL, signed(self.key), 2), b"hi").split(b"\r\n")[0]


def head(path: str, headers: Headers, length: int | None = None, method: str = "POST", version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "host: x", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [] if length is None else [f"content-length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("gateway"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway, "SILENCE", 1.0)
        patch.setattr(gateway, "HELD_SECONDS", 0.1)
        patch.setattr(connections, "SECONDS", 2.0)
        opened = open_door(made.door, "127.0.0.1", made.port, made.files.certificate, made.files.key)
        yield made
        opened.close()


def changed(headers: Headers, **values: str | None) -> Headers:
    merged: dict[str, str | None] = {**headers, **{name.replace("_", "-"): value for name, value in values.items()}}
    return {name: value for name, value in merged.items() if value is not None}


KEYLESS: dict[str, Callable[[Place], Headers]] = {
    "nothing": lambda p: {},
    "a key of its own": lambda p: signed(p.stranger),
    "another's key, its own signature": lambda p: changed(
        signed(p.key), flwr_signature=signed(p.stranger)["flwr-signature"]
    ),
    "another's key, no signature": lambda p: changed(signed(p.key), flwr_signature=None),
    "another's key, no time": lambda p: changed(signed(p.key), flwr_timestamp=None),
    "an old signature": lambda p: signed(p.key, -400),
    "a signature of tomorrow": lambda p: signed(p.key, 86_400),
    "a time without a zone": lambda p: changed(signed(p.key), flwr_timestamp="2026-01-01T00:00:00"),
    "no time": lambda p: changed(signed(p.key), flwr_timestamp="now"),
    "no base64": lambda p: changed(signed(p.key), flwr_public_key="%%%"),
    "no key": lambda p: changed(signed(p.key), flwr_public_key=b64encode(b"key").decode()),
    "letters beyond ASCII": lambda p: changed(signed(p.key), flwr_signature="\xff\xfe"),
}
BODIES: dict[str, tuple[Headers, int | None, list[bytes]]] = {
    "none": ({}, 0, []),
    "small": ({}, 4, [b"body"]),
    "large": ({}, 2**30, [b"x" * 2**16] * 4),
    "begun": ({}, 2**20, [b"x"]),
    "chunked": ({"transfer-encoding": "chunked"}, None, [b"4\r\nbody\r\n"] * 3),
    "compressed": ({"content-encoding": "gzip"}, 4, [b"body"]),
    "of an unknown length": ({"content-length": "-1"}, None, [b"body"]),
    "announced": ({"expect": "100-continue"}, 2**20, []),
    "of two lengths": ({"content-length": "4", "Content-Length": "9"}, None, [b"body"]),
}


def test_a_hundred_requests_without_a_key_reach_nothing(place: Place) -> None:
    """12 kinds of headers x 9 bodies: an answer or a closed door, before a body is read; and nothing counts for a."""
    before, up = len(place.inside.bodies), dict(place.door.traffic.up)
    count = 0
    for kind, headers in KEYLESS.items():
        for name, (more, length, parts) in BODIES.items():
            started = time.monotonic()
            answer = place.request(head(PUSH, {**headers(place), **more}, length), *parts)
            assert answer == b"" or answer.split()[1] in (b"400", b"401", b"412"), (kind, name, answer)
            assert time.monotonic() - started < 5, (kind, name)
            count += 1
    assert count >= 100
    assert len(place.inside.bodies) == before
    assert dict(place.door.traffic.up) == up
    assert place.served()


def test_a_header_that_is_there_twice_is_none(place: Place) -> None:
    mine, theirs = signed(place.key), signed(place.stranger)
    twice = head(PUSH, {**mine, "Flwr-Signature": theirs["flwr-signature"]}, 0)
    assert place.request(twice).split()[1] == b"401"


@pytest.mark.parametrize(
    "said",
    [
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/control/run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/fleet/../../x HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST " + PULL.encode() + b" HTTP/1.0\r\n\r\n",
        b"POST " + PULL.encode() + b" HTTP/1.1\r\nx: " + b"y" * 2**16,
        b"POST " + PULL.encode() + b" HTTP/1.1\r\n" + b"x: y\r\n" * 9000,
        b"\r\n" * 5000,
        b"POST " + PULL.encode() + b" HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01" + b"\x00" * 64,
    ],
    ids=range(12),
)
def test_what_is_no_request_of_a_node_is_ended(said: bytes, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    before = len(place.inside.bodies)
    answer = place.request(said)
    assert answer == b"" or answer.split()[1][:1] == b"4", answer
    assert len(place.inside.bodies) == before
    assert place.served()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("begun", [b"", b"POST ", b"POST " + PULL.encode() + b" HTTP/1.1\r\nhost: x\r\n"])
def test_who_says_nothing_is_not_waited_for(begun: bytes, place: Place) -> None:
    with place.connect() as line:
        line.sendall(begun)
        line.settimeout(10)
        started = time.monotonic()
        with suppress(ConnectionResetError):
            assert line.recv(100) == b""
        assert 1 < time.monotonic() - started < 6


def test_those_who_wait_are_few_and_a_site_is_served_beside_them(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST", 20)
    idle = [place.connect() for _ in range(40)]
    assert wait_for(lambda: len(place.door.waiting) <= 20)
    assert place.served()
    for line in idle:
        line.close()
    assert wait_for(lambda: len(place.door.waiting) == 0)


def test_a_connection_that_showed_a_key_is_kept(place: Place) -> None:
    with place.connect() as line:
        line.settimeout(10)
        for _ in range(2):
            line.sendall(head(PULL, signed(place.key), 2) + b"hi")
            answer = b""
            while b"ok\r\n0\r\n\r\n" not in answer:
                answer += line.recv(4096)
            assert b" 200 " in answer
            time.sleep(2.5)  # beyond the time of those who wait


@pytest.mark.parametrize("ending", ["closed", "silent"])
def test_a_body_that_ends_too_soon_reaches_nothing(ending: str, place: Place) -> None:
    before, held, up = len(place.inside.bodies), place.door.traffic.held["a"], place.door.traffic.up["a"]
    with place.connect() as line:
        line.settimeout(10)
        line.sendall(head(OBJECT, signed(place.key), 1000) + b"x" * 500)
        if ending == "silent":
            assert b" 408 " in line.recv(4096)
        assert wait_for(lambda: place.door.traffic.up["a"] == up + 500)
    assert wait_for(lambda: place.door.traffic.held["a"] == held)
    assert wait_for(lambda: place.door.traffic.requests["a"] == 0)
    assert len(place.inside.bodies) == before
    assert place.served()


def test_a_sites_bodies_are_bounded_one_by_one_and_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SILENCE", 60.0)
    whole = LIMIT + 2**20
    assert b" 413 " in place.request(head(OBJECT, signed(place.key), whole + 1), b"x" * (whole + 1))
    place.request(head(PUSH, signed(place.key), 0))  # begins an answer, whose bytes are counted anew
    lines = []
    for _ in range(4):  # each within the bound, together beyond it, and all unfinished
        lines.append(place.connect())
        with contextlib.suppress(OSError):  # the last may be refused while it is being sent
            lines[-1].sendall(head(OBJECT, signed(place.key), whole) + b"x" * (whole // 3))
    assert wait_for(lambda: place.door.traffic.held["a"] <= whole)
    assert max(place.door.traffic.held.values()) <= whole + 2**17
    for line in lines:
        line.close()
    assert wait_for(lambda: place.door.traffic.held["a"] == 0)
    place.request(head(PUSH, signed(place.key), 0))
    assert place.served()


def test_each_bound_of_bodies_holds_by_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small request beyond its size; an answer in parts, one after the other; two at once, of two answers."""
    monkeypatch.setattr(gateway, "SILENCE", 60.0)
    monkeypatch.setattr(gateway, "_SMALL", 1000)
    part = (LIMIT + 2**20) * 2 // 3
    begin = head(PUSH, signed(place.key), 0)
    assert b" 413 " in place.request(head(PULL, signed(place.key), 1001), b"x" * 1001)
    place.request(begin)
    assert b" 200 " in place.request(head(OBJECT, signed(place.key), part), b"x" * part)
    assert b" 413 " in place.request(head(OBJECT, signed(place.key), part), b"x" * part)
    place.request(begin)
    with place.connect() as line:
        line.sendall(head(OBJECT, signed(place.key), part + 1) + b"x" * part)  # unfinished
        assert wait_for(lambda: place.door.traffic.held["a"] == part)
        place.request(begin)
        assert b" 413 " in place.request(head(OBJECT, signed(place.key), part), b"x" * part)
    assert wait_for(lambda: place.door.traffic.held["a"] == 0)
    place.request(begin)
    assert place.served()


def test_a_packed_body_is_not_taken_from_a_site_either(place: Place) -> None:
    before = len(place.inside.bodies)
    packed = {**signed(place.key), "Content-Encoding": "gzip"}
    assert b" 415 " in place.request(head(PULL, packed, 2), b"hi")
    assert len(place.inside.bodies) == before


def test_a_port_that_is_taken_is_said(place: Place) -> None:
    with pytest.raises(FederationError, match=f"port {place.port} of 127.0.0.1 cannot be served"):
        open_door(place.door, "127.0.0.1", place.port, place.files.certificate, place.files.key)
    assert place.served()


def test_a_site_has_so_many_requests_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "AT_ONCE", 3)
    monkeypatch.setattr(gateway, "SILENCE", 60.0)
    lines = [place.connect() for _ in range(3)]
    for line in lines:
        line.sendall(head(OBJECT, signed(place.key), 10))
    assert wait_for(lambda: place.door.traffic.requests["a"] == 3)
    assert b" 429 " in place.request(head(PULL, signed(place.key), 2), b"hi")
    for line in lines:
        line.close()
    assert wait_for(lambda: place.door.traffic.requests["a"] == 0)
    assert place.served()


SERVER = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.test_flower_gateway import Inside
from florana.flower.deploy.gateway import Door, open_door
from florana.flower.deploy.keys import Certificates
from florana.flower.deploy.roster import read_roster
folder, port = Path(sys.argv[1]), int(sys.argv[2])
files = Certificates(folder)
door = Door(Inside(), 2**28, {pem: name for name, pem in read_roster(files.roster).keys.items()})
opened = open_door(door, "127.0.0.1", port, files.certificate, files.key)
print("open", flush=True)
threading.Event().wait()
"""


@contextmanager
def uploads(place: Place, port: int, count: int) -> Iterator[list[int]]:
    """Uploads without end under made-up keys; yields what each has sent."""
    done, sent = threading.Event(), [0] * count

    def upload(index: int) -> None:
        while not done.is_set():
            try:
                key = ec.generate_private_key(ec.SECP384R1())
                context = ssl.create_default_context(cafile=str(place.files.authority))
                raw = socket.create_connection(("127.0.0.1", port), 10)
                with context.wrap_socket(raw, server_hostname="127.0.0.1") as line:
                    line.settimeout(5)
                    line.sendall(head(OBJECT, signed(key), 2**28))
                    while not done.is_set():
                        line.sendall(b"x" * 2**16)
                        sent[index] += 2**16
            except OSError:
                continue

    threads = [threading.Thread(target=upload, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield sent
    finally:
        done.set()
        for thread in threads:
            thread.join(10)


def test_eight_uploads_under_made_up_keys_take_no_memory(place: Place) -> None:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(place.files.folder), str(port), str(ROOT)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "open\n"
        memory = psutil.Process(server.pid).memory_info
        before, most = memory().rss, 0
        with uploads(place, port, 8):
            for _ in range(20):
                time.sleep(0.1)
                most = max(most, memory().rss)
        assert most - before < 64 * 2**20, f"{(most - before) / 2**20:.0f} MiB"
    finally:
        server.kill()
        server.communicate()


def test_a_site_that_is_revoked_while_the_server_runs_is_refused_at_once(tmp_path: Path) -> None:
    made = Place(tmp_path)
    door = Door(made.inside, LIMIT, LiveRoster(made.files.roster, read_roster(made.files.roster)))
    opened = open_door(door, "127.0.0.1", made.port, made.files.certificate, made.files.key)
    try:
        assert made.served()
        revoke(made.files, "a")
        assert b"412" in made.request(head(PULL, signed(made.key), 2), b"hi").split(b"\r\n")[0]
        assert len(made.inside.bodies) == 1
        approve(made.files, tmp_path / "a" / "a.pub")
        assert made.served(), "approved again, with the same key"
    finally:
        opened.close()
