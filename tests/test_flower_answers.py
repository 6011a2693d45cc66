"""What a site takes of a server that was taken over: no redirect, nothing packed, no more than a request may have."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w
import torch
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.supercore.protobuf.client import ProtobufRequestContext

from florana.cli.main import app
from florana.errors import FederationError, InputError, RecipeError
from florana.flower.app.frames import Frame
from florana.flower.deploy import bounded_answers
from florana.flower.deploy import gateway as front
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.bounded_answers import BoundedAnswers, largest_request
from florana.flower.deploy.fleet import make_link
from florana.flower.deploy.gateway import Door, Receive, Scope, Send, open_door
from florana.flower.deploy.invitation import Invitation, invite, read_invitation, site_recipe
from florana.flower.deploy.keys import make_site, read_private
from florana.flower.deploy.node import attend
from florana.flower.deploy.roster import approve, read_roster
from florana.lora.factors import Adapter, LoraFactors
from tests.deployment import free_port
from tests.test_flower_link import ECHO, Place, ask, echo, online, place  # noqa: F401  (a fixture)


@pytest.fixture
def house() -> Iterator[tuple[int, list[str]]]:
    """Another machine of a site's house: its port, and what it was asked."""
    asked: list[str] = []

    class Listening(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_GET = do_POST  # noqa: N815  (the library's own name)

        def log_message(self, *said: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listening) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], asked
        server.shutdown()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_site_goes_nowhere_else(
    status: int, house: tuple[int, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, asked = house
    monkeypatch.setattr(front, "HELD_SECONDS", 0.1)

    async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
        where = [(b"location", f"http://127.0.0.1:{other}/private".encode())]
        await send({"type": "http.response.start", "status": status, "headers": where})
        await send({"type": "http.response.body", "body": b""})

    files, port = make_server(tmp_path / "fed", ["127.0.0.1"]), free_port()
    make_site(tmp_path / "a", "a")
    approve(files, tmp_path / "a" / "a.pub")
    keys = {pem: name for name, pem in read_roster(files.roster).keys.items()}
    opened = open_door(Door(elsewhere, 2**20, keys), "127.0.0.1", port, files.certificate, files.key)
    invitation = Invitation(tmp_path, "127.0.0.1", port, files.authority, tmp_path / "recipe.toml")
    done = threading.Event()
    timer = threading.Timer(10, done.set)
    timer.start()
    try:
        with pytest.raises(FederationError, match="sends this site to another place"):
            attend(invitation, read_private(tmp_path / "a")[1], lambda frame: Frame("reply"), done)
    finally:
        timer.cancel()
        opened.close()
    assert asked == []


def test_an_invitation_brings_no_code(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """A method of one's own is a file beside the recipe: reading an operator's ran it, at join and at doctor."""
    mark, files = tmp_path / "ran", make_server(tmp_path / "fed", ["127.0.0.1"])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(recipe_table))
    folder = invite(recipe, files, "127.0.0.1", 4711, tmp_path / "invitation")
    for name in ("own.py:rule", f"{folder}/own.py:rule", " own.py:rule", "../invitation/own.py:rule"):
        for beside in (folder, tmp_path):
            (beside / "own.py").write_text(
                f"open({str(mark)!r}, 'w')\ndef rule(parts, rank): return parts[0].adapter\n"
            )
        (folder / "recipe.toml").write_text(tomli_w.dumps(recipe_table | {"strategy": {"name": name}}))
        with pytest.raises(RecipeError, match="a method that is a file of Python"):
            site_recipe(read_invitation(folder), None, None, [])
        site = ["--site", str(tmp_path / "a"), "--data", str(tmp_path / "rows.csv")]
        for verb in ("join", "doctor"):
            assert CliRunner().invoke(app, [verb, str(folder), *site]).exit_code != 0
        with pytest.raises(RecipeError, match="a method that is a file of Python"):
            invite(folder / "recipe.toml", files, "127.0.0.1", 4711, tmp_path / "another")
    assert not mark.exists()


def test_an_invitation_is_a_whole_one_in_a_folder_of_its_own(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    files, recipe, folder = make_server(tmp_path / "fed", ["127.0.0.1"]), tmp_path / "recipe.toml", tmp_path / "new"
    recipe.write_text(tomli_w.dumps(recipe_table))
    with pytest.raises(InputError, match=r"server\.crt is not for 'elsewhere'"):
        invite(recipe, files, "elsewhere", 4711, folder)
    folder.mkdir()
    invite(recipe, files, "127.0.0.1", 4711, folder)  # an empty one will do
    for taken in (folder, recipe):
        with pytest.raises(RecipeError, match="exists already"):
            invite(recipe, files, "127.0.0.1", 4711, taken)
    assert site_recipe(read_invitation(folder), None, None, []).strategy == recipe_table["strategy"]
    table = {**recipe_table, "model": {**recipe_table["model"], "base": "/nowhere/model"}}
    (folder / "recipe.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(InputError, match="does not lead to one here: /nowhere/model"):
        site_recipe(read_invitation(folder), None, None, [])
    for missing in ("recipe.toml", "federation.toml"):
        (folder / missing).unlink()
        with pytest.raises(InputError, match="is no invitation to a federation"):
            read_invitation(folder)


class Sent(httpx.SyncByteStream):
    """Bytes as they come over a line, once."""

    def __init__(self, *parts: bytes) -> None:
        self.parts, self.read = parts, 0

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            self.read += 1
            yield part


class Tampering:
    """The fleet API of a server, one of whose answers is replaced."""

    def __init__(self, app: Any, path: str) -> None:
        self.app, self.path = app, path
        self.change: Callable[[bytes], bytes | None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.change is None or not scope["path"].endswith(self.path):
            await self.app(scope, receive, send)
            return
        begun, body = dict[str, Any](), bytearray()

        async def caught(message: Any) -> None:
            begun.update({k: v for k, v in message.items() if k in ("status", "headers")})
            body.extend(message.get("body", b""))

        await self.app(scope, receive, caught)
        told = self.change(bytes(body))
        if told is not None:
            self.change, body = None, bytearray(told)
        headers = [(name, value) for name, value in begun["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": begun["status"], "headers": headers})
        await send({"type": "http.response.body", "body": bytes(body)})


def of_a_request(change: Callable[[PullMessagesResponse], object]) -> Callable[[bytes], bytes | None]:
    def changed(body: bytes) -> bytes | None:
        told = PullMessagesResponse.FromString(body)
        if not told.messages_list:
            return None
        change(told)
        return told.SerializeToString()

    return changed


STRANGE: dict[str, Callable[[bytes], bytes | None]] = {
    "a page": lambda body: b"<html>please sign in</html>",
    "nothing": lambda body: b"",
    "nested": lambda body: b"\x0a\x7f" * 50_000,
    "cut off": lambda body: body[: len(body) // 2] or None,
    "no parts": of_a_request(lambda told: told.ClearField("message_object_trees")),
    "no request": of_a_request(lambda told: told.ClearField("messages_list")),
    "two requests of one's parts": of_a_request(lambda told: told.messages_list.add()),
    "no metadata": of_a_request(lambda told: told.messages_list[0].ClearField("metadata")),
    "another part": of_a_request(lambda told: setattr(told.message_object_trees[0], "object_id", "../../x")),
    "a time that is none": of_a_request(lambda told: setattr(told.messages_list[0].metadata, "ttl", float("nan"))),
    "a kind that is none": of_a_request(lambda told: setattr(told.messages_list[0].metadata, "message_type", "\x1b")),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_site_outlives_an_answer_that_is_none(kind: str, place: Place) -> None:  # noqa: F811
    """And answers the next request; what cannot be read is said once, and is nobody's bug."""
    keys = read_roster(place.files.roster).keys
    link, fleet = make_link(keys)
    tampering = Tampering(fleet, "/pull-messages")
    door = Door(tampering, 2**20, {pem: name for name, pem in keys.items()}, lambda: link.asked)
    opened = open_door(door, "127.0.0.1", place.port, place.files.certificate, place.files.key)
    try:
        with place.site(echo) as site:
            online(link)
            tampering.change = STRANGE[kind]
            ask(link, ECHO, 1.0)
            assert tampering.change is None, "nothing was tampered with"
            assert site.is_alive()
            assert ask(link, ECHO) == Frame("reply", ECHO.fields, ECHO.payload)
    finally:
        opened.close()


def test_an_error_of_the_sites_own_ends_it(place: Place) -> None:  # noqa: F811
    """And is not taken for a server that speaks another language."""
    ended: list[BaseException] = []

    def broken(frame: Frame) -> Frame:
        raise ValueError("the site's own")

    def attending() -> None:
        try:
            attend(place.invitation, read_private(place.folder / "a")[1], broken, threading.Event())
        except ValueError as error:
            ended.append(error)

    with place.server() as link:
        site = threading.Thread(target=attending, daemon=True)
        site.start()
        ask(link, ECHO, 1.0)
        site.join(20)
    assert [str(error) for error in ended] == ["the site's own"]


def test_a_request_beyond_the_bound_ends_the_site_with_its_reason(place: Place) -> None:  # noqa: F811
    ended: list[BaseException] = []

    def attending() -> None:
        try:
            attend(place.invitation, read_private(place.folder / "a")[1], echo, threading.Event(), most=10**6)
        except FederationError as error:
            ended.append(error)

    with place.server() as link:
        site = threading.Thread(target=attending, daemon=True)
        site.start()
        assert ask(link, Frame("train", {}, bytes(9 * 10**5))) == Frame("reply", {}, bytes(9 * 10**5))
        ask(link, Frame("train", {}, bytes(11 * 10**5)), 2.0)
        site.join(20)
    assert "request has more than 1000000 bytes" in str(ended[0])


def answers(respond: Callable[[httpx.Request], httpx.Response], most: int = 1000) -> Callable[[str], httpx.Response]:
    """What the interceptor makes of a server's answers, by the name of Flower's call."""
    bounded = BoundedAnswers(httpx.Client(transport=httpx.MockTransport(respond)), most)

    def call(method: str) -> httpx.Response:
        request = httpx.Request("POST", "https://server/v1/fleet/x", content=b"asked")
        context = ProtobufRequestContext(f"/flwr.proto.Fleet/{method}", PullMessagesRequest(), request)
        return bounded.intercept(context, lambda given: pytest.fail("Flower's own client was asked"))

    return call


def test_an_answer_comes_as_it_is() -> None:
    seen: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(412, headers={"x": "y"}, stream=Sent(b"not ", b"approved"))

    got = answers(respond)("ActivateNode")
    assert (got.status_code, got.headers["x"], got.content, got.text) == (412, "y", b"not approved", "not approved")
    with pytest.raises(httpx.HTTPStatusError):
        got.raise_for_status()
    assert (seen[0].headers["accept-encoding"], seen[0].content) == ("identity", b"asked")


def test_a_packed_answer_is_not_taken() -> None:
    small = gzip.compress(bytes(10**7))
    call = answers(lambda request: httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Sent(small)))
    with pytest.raises(FederationError, match="is packed"):
        call("PullMessages")


@pytest.mark.parametrize("told", [True, False])
def test_an_answer_is_read_no_further_than_it_may_be(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_answers, "ONE", 1000)
    endless, length = Sent(*[bytes(100)] * 10_000), {"content-length": "1000000"} if told else {}
    with pytest.raises(FederationError, match="answer has more than 1000 bytes"):
        answers(lambda request: httpx.Response(200, headers=length, stream=endless))("PullMessages")
    assert endless.read == 11
    whole = answers(lambda request: httpx.Response(200, stream=Sent(*[bytes(100)] * 10)))("PullMessages")
    assert whole.content == bytes(1000)


def test_the_pieces_of_a_request_are_bounded_together() -> None:
    call = answers(lambda request: httpx.Response(200, stream=Sent(bytes(400))), most=1000)
    for _ in range(3):  # three requests of two pieces each
        for method in ("PullMessages", "PullObject", "PullObject", "ConfirmMessageReceived", "SendNodeHeartbeat"):
            call(method)
    with pytest.raises(FederationError, match="request has more than 1000 bytes"):
        call("PullObject")
    call("PullMessages")
    assert call("PullObject").content == bytes(400)


def test_a_request_may_be_four_times_the_adapted_layers() -> None:
    def pair(out: int, into: int) -> LoraFactors:
        return LoraFactors(torch.zeros(out, 1), torch.zeros(1, into), 1.0)

    assert largest_request(Adapter({"q": pair(64, 48)})) == 2**30
    large = Adapter({"q": pair(2**14, 2**13), "v": pair(2**13, 2**12)})
    assert largest_request(large) == 4 * 4 * (2**27 + 2**25)
