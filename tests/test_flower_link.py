"""The line between a server and its sites, over TLS in one process: what is lost on it, and what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

import florana.flower.app.flower_engine as engine_of
import florana.flower.deploy.fleet as link_of
import florana.flower.deploy.gateway as front
import florana.flower.deploy.node as node_of
from florana.errors import FederationError
from florana.federation.messages import Failure
from florana.flower.app.flower_engine import exchange
from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.fleet import Link, make_link
from florana.flower.deploy.gateway import Door, open_door
from florana.flower.deploy.invitation import Invitation
from florana.flower.deploy.kept_update import remembered
from florana.flower.deploy.keys import make_site, read_private
from florana.flower.deploy.node import attend
from florana.flower.deploy.roster import approve, read_roster
from tests.deployment import free_port
from tests.program import wait_for

ECHO = Frame("hello", {"word": "x"}, b"tensors")


class Place:
    """An operator's and two sites' folders, and the port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.files = make_server(folder / "fed", ["127.0.0.1"])
        for name in ("a", "b"):
            make_site(folder / name, name)
        approve(self.files, folder / "a" / "a.pub")
        self.recipe = folder / "recipe.toml"
        self.said: list[str] = []

    @property
    def invitation(self) -> Invitation:
        return Invitation(self.folder, "127.0.0.1", self.port, self.files.authority, self.recipe)

    @contextmanager
    def server(self, limit: int = 2**20) -> Iterator[Link]:
        keys = read_roster(self.files.roster).keys
        link, fleet = make_link(keys)
        door = Door(fleet, limit, {key: client for client, key in keys.items()}, lambda: link.asked)
        opened = open_door(door, "127.0.0.1", self.port, self.files.certificate, self.files.key)
        try:
            yield link
        finally:
            opened.close()

    @contextmanager
    def site(
        self, answer: Callable[[Frame], Frame], who: str = "a", ends: Collection[str] = ()
    ) -> Iterator[threading.Thread]:
        done = threading.Event()
        key = read_private(self.folder / who)[1]
        thread = threading.Thread(
            target=attend, args=(self.invitation, key, answer, done, self.said.append, ends), daemon=True
        )
        thread.start()
        try:
            yield thread
        finally:
            done.set()
            thread.join(20)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(node_of, "TRIES_AGAIN", 0.1)
    monkeypatch.setattr(node_of, "ASKS_AGAIN", 0.05)
    monkeypatch.setattr(front, "HELD_SECONDS", 0.5)
    return Place(tmp_path)


def online(link: Link) -> int:
    assert wait_for(lambda: bool(list(link.get_nodes())), 20), "the site did not come"
    return int(next(iter(link.get_nodes())).node_id)


def ask(link: Link, frame: Frame, deadline: float = 20.0, node: int | None = None) -> Frame | Failure:
    ((client, answer),) = exchange(link, {"a": (node or online(link), frame)}, deadline, MessageType.TRAIN)
    assert client == "a"
    return answer


def soon() -> threading.Event:
    """Set after ten seconds: what should have ended by itself would else go on for ever."""
    done = threading.Event()
    timer = threading.Timer(10, done.set)
    timer.daemon = True
    timer.start()
    return done


def echo(frame: Frame) -> Frame:
    return Frame("reply", frame.fields, frame.payload)


def stored(link: Link) -> dict[str, int]:
    """What Flower's state holds of messages."""
    state: Any = link.state
    return {
        "requests": len(state.message_ins_store),
        "answers": len(state.message_res_store),
        "pairs": len(state.message_ins_id_to_message_res_id),
        "objects": len(state.object_store),
        "sessions": len(state._object_push_sessions),
    }


def test_requests_are_answered_and_nothing_of_them_stays(place: Place) -> None:
    payload = bytes(range(256)) * 50_000  # of several of Flower's chunks
    with place.server(2**26) as link, place.site(echo):
        for round_ in range(4):
            answer = ask(link, Frame("train", {"round": round_}, payload))
            assert answer == Frame("reply", {"round": round_}, payload)
            assert wait_for(lambda: not any(stored(link).values()), 5), stored(link)


def test_a_site_that_does_not_know_when_to_stop_is_asked_the_newest(place: Place) -> None:
    """A request that was not answered in time is taken back; the site that is behind drops it, says so, catches up."""
    late, heard = threading.Event(), []

    def slow(frame: Frame) -> Frame:
        heard.append(frame.fields["round"])
        if frame.fields["round"] == 1:
            assert late.wait(20)
        return echo(frame)

    with place.server() as link, place.site(slow):
        online(link)
        first = ask(link, Frame("train", {"round": 1}), deadline=3.0)
        assert isinstance(first, Failure)
        assert "did not answer within" in first.reason
        assert heard == [1]
        second = threading.Thread(target=lambda: heard.append(ask(link, Frame("train", {"round": 2}))))
        second.start()
        time.sleep(0.3)
        late.set()
        second.join(20)
        assert heard == [1, 2, Frame("reply", {"round": 2})]
        assert any("does not wait for this answer" in line for line in place.said)
        for round_ in range(3, 6):  # and it stays in step
            assert ask(link, Frame("train", {"round": round_})) == Frame("reply", {"round": round_})
        assert wait_for(lambda: not any(stored(link).values()), 5), stored(link)


def test_a_killed_site_that_comes_back_at_once_gets_what_it_was_at_work_on(place: Place) -> None:
    began, hang = threading.Event(), threading.Event()

    def hanging(frame: Frame) -> Frame:
        began.set()
        hang.wait(30)
        return Frame("failure", {"reason": "it was killed"})

    answers: list[Frame | Failure] = []
    with place.server() as link, place.site(hanging):
        asked = threading.Thread(target=lambda: answers.append(ask(link, Frame("train", {"round": 1}))))
        asked.start()
        assert began.wait(20)
        with place.site(echo):  # the same key, while the server still counts it as online
            asked.join(20)
            assert answers == [Frame("reply", {"round": 1})]
        hang.set()


class Broken(httpx.TransportError):
    pass


@pytest.mark.parametrize("at", ["PullMessages", "PullObject", "ConfirmMessageReceived", "PushMessages", "PushObject"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_broken_connection_costs_no_answer(place: Place, at: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line breaks once at each step, before the server has heard of it and after; the round has its answer."""
    real, broken = getattr(node_of.FleetHttpClient, at), []

    def breaking(client: Any, request: Any) -> Any:
        said = None if when == "before" else real(client, request)
        has_work = not isinstance(request, PullMessagesRequest) or when == "before" or said.messages_list
        if not broken and has_work:
            broken.append(at)
            raise Broken("the line broke")
        return real(client, request) if when == "before" else said

    heard = []
    with place.server() as link, place.site(lambda frame: heard.append(frame) or echo(frame)):  # type: ignore[func-returns-value]
        node = online(link)
        monkeypatch.setattr(node_of.FleetHttpClient, at, breaking)
        assert ask(link, ECHO, node=node) == Frame("reply", ECHO.fields, ECHO.payload)
        assert ask(link, ECHO) == Frame("reply", ECHO.fields, ECHO.payload)
        assert broken == [at]


def test_a_part_of_a_request_that_is_lost_is_fetched_again_and_no_other(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked, lost = node_of.FleetHttpClient.PullObject, list[str](), list[str]()

    def breaking(client: Any, request: Any) -> Any:
        asked.append(request.object_id)
        if len(lost) < 3 and len(set(asked)) > 1:  # its second part, three times
            lost.append(request.object_id)
            raise Broken("the line broke")
        return real(client, request)

    monkeypatch.setattr(node_of.FleetHttpClient, "PullObject", breaking)
    with place.server() as link, place.site(echo):
        assert ask(link, ECHO) == Frame("reply", ECHO.fields, ECHO.payload)
    assert len(lost) == 3
    assert len(asked) == len(set(asked)) + 3
    assert not any("not there" in said for said in place.said)


def test_a_server_that_is_started_anew_finds_its_site_and_its_answer(place: Place) -> None:
    """The site finishes while no server is there; the new one asks the same again and gets the finished update."""
    began, go, made = threading.Event(), threading.Event(), []

    def train(frame: Frame) -> Frame:
        made.append(frame.fields["nonce"])
        began.set()
        assert go.wait(30)
        return Frame("reply", {"reply": {"round": 1}, "nonce": frame.fields["nonce"]}, b"trained")

    kept = place.folder / "a" / "answer"
    with place.server() as link:
        site = place.site(lambda frame: remembered(train, frame, kept))
        site.__enter__()
        threading.Thread(
            target=ask, args=(link, Frame("train", {"brief": 1, "nonce": "old"}, b"p")), daemon=True
        ).start()
        assert began.wait(20)
    go.set()  # no server is there now
    assert wait_for(kept.exists, 20)
    with place.server() as link:
        answer = ask(link, Frame("train", {"brief": 1, "nonce": "new"}, b"p"))
        assert answer == Frame("reply", {"reply": {"round": 1}, "nonce": "new"}, b"trained")
        assert made == ["old"], "it was not trained again"
        assert ask(link, Frame("train", {"brief": 2, "nonce": "x"}, b"p")) == Frame(
            "reply", {"reply": {"round": 1}, "nonce": "x"}, b"trained"
        )
        assert made == ["old", "x"], "another request is another training"
        site.__exit__(None, None, None)


def test_an_answer_that_is_too_large_ends_as_a_failure_of_that_site(place: Place) -> None:
    with place.server(limit=1000) as link, place.site(lambda frame: Frame("reply", {}, bytes(3 * 2**20))):
        answer = ask(link, ECHO)
        assert isinstance(answer, Frame)
        assert answer.kind == "failure"
        assert "too large: an answer may have 1000 bytes" in answer.fields["reason"]


def test_an_error_of_the_server_is_not_called_an_answer_too_large(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = node_of.FleetHttpClient.PushMessages, []

    def failing(client: Any, request: Any) -> Any:
        if not refused:
            refused.append(request)
            asked = httpx.Request("POST", "https://127.0.0.1/v1/fleet/push-messages")
            raise httpx.HTTPStatusError("broken", request=asked, response=httpx.Response(500, request=asked))
        return real(client, request)

    monkeypatch.setattr(node_of.FleetHttpClient, "PushMessages", failing)
    with place.server() as link, place.site(echo):
        assert ask(link, ECHO) == Frame("reply", ECHO.fields, ECHO.payload)
    assert len(refused) == 1


def test_a_site_that_is_told_to_end_tries_no_further() -> None:
    tried = []

    def broken(request: str) -> str:
        tried.append(request)
        raise Broken("the line broke")

    with pytest.raises(Broken):
        node_of._persistent(broken, lambda seconds: True)("x")
    assert tried == ["x"]
    tried.clear()
    with pytest.raises(Broken):
        node_of._persistent(broken, lambda seconds: False)("x")
    assert tried == ["x"] * (node_of.BREAKS + 1)


def test_parts_that_make_no_message_are_no_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = link_of.inflate_object_from_contents
    monkeypatch.setattr(link_of, "inflate_object_from_contents", lambda *parts: real(*parts).content)
    with place.server() as link, place.site(echo):
        answer = ask(link, ECHO)
    assert isinstance(answer, Failure)
    assert "cannot be decoded (ValueError)" in answer.reason


def test_a_server_that_is_gone_is_no_clients_fault() -> None:
    class Gone:
        def push_messages(self, messages: Any) -> list[str]:
            return ["one"] * len(messages)

        def pull_messages(self, message_ids: Any) -> list[Any]:
            raise httpx.ConnectError("nobody is there")

    with pytest.raises(httpx.ConnectError):
        list(exchange(Gone(), {"a": (1, ECHO)}, 20.0))  # type: ignore[arg-type]


def test_what_flower_reports_in_a_sites_place_is_said_in_words() -> None:
    asked = Message(to_record(ECHO), dst_node_id=1, message_type=MessageType.TRAIN)
    for error, words in (
        (Error(ErrorCode.NODE_UNAVAILABLE), "left, or was not heard of any more"),
        (Error(ErrorCode.UNKNOWN, "out of\n  memory"), "Flower reports error 0 for it: out of memory"),
    ):
        assert engine_of._frame_of(Message(error, reply_to=asked)) == Failure("", words)


def test_a_site_that_leaves_and_comes_back_soon_gets_what_it_was_asked(place: Place) -> None:
    answers: list[Frame | Failure] = []
    with place.server() as link:
        with place.site(echo):
            node = online(link)
        asked = threading.Thread(target=lambda: answers.append(ask(link, ECHO, node=node)))
        asked.start()
        time.sleep(0.3)
        with place.site(echo):
            asked.join(20)
        assert answers == [Frame("reply", ECHO.fields, ECHO.payload)]


def test_a_site_at_work_is_heard_of_all_the_while(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_of, "BEATS", 0.1)
    began, go = threading.Event(), threading.Event()

    def long(frame: Frame) -> Frame:
        began.set()
        assert go.wait(20)
        return echo(frame)

    def until(link: Link) -> float:
        (known,) = link.get_nodes()
        return float(known.online_until)

    with place.server() as link, place.site(long):
        online(link)
        asked = threading.Thread(target=ask, args=(link, ECHO))
        asked.start()
        assert began.wait(20)
        before = until(link)
        assert wait_for(lambda: until(link) > before, 10)
        go.set()
        asked.join(20)


def test_a_site_that_leaves_for_good_is_missed_before_the_deadline(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_of, "PATIENCE", 0.5)
    with place.server() as link:
        with place.site(echo):
            node = online(link)
        answer = ask(link, ECHO, deadline=30, node=node)
        assert isinstance(answer, Failure)
        assert answer.reason == "left, or was not heard of any more"
        assert stored(link) == dict.fromkeys(stored(link), 0)


def test_the_answer_of_a_site_that_has_left_before_the_server_looks_is_taken(place: Place) -> None:
    """Flower's own state hides it as soon as the node is offline."""
    with place.server() as link, place.site(lambda frame: Frame("ended"), ends=["ended"]) as site:
        request = Message(to_record(Frame("ended")), dst_node_id=online(link), message_type=MessageType.QUERY, ttl=60.0)
        (identity,) = link.push_messages([request])
        site.join(20)
        assert not site.is_alive()
        assert wait_for(lambda: not any(info.status == "online" for info in link.get_nodes()), 5)
        (answer,) = link.pull_messages([identity])
        assert not answer.has_error()
        assert from_record(answer.content).kind == "ended"
        assert not link.state.message_res_store


def test_a_site_leaves_after_the_last_answer_and_says_before_what_it_waits_for(place: Place) -> None:
    with place.server() as link, place.site(lambda frame: Frame("ended"), ends=["ended"]) as site:
        node = online(link)
        assert wait_for(lambda: bool(place.said), 20)
        assert place.said == ["connected; waiting for the server to ask (it begins when enough sites are there)"]
        answer = ask(link, Frame("ended"), node=node)
        assert isinstance(answer, Frame)
        assert answer.kind == "ended"
        site.join(20)
        assert not site.is_alive()
        assert wait_for(lambda: not list(link.get_nodes()), 20), "it did not say that it leaves"


def test_a_last_answer_to_a_server_that_is_gone_ends_the_site_all_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(client: Any, request: Any) -> Any:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(node_of.FleetHttpClient, "PushMessages", gone)
    with place.server() as link, place.site(lambda frame: Frame("ended"), ends=["ended"]) as site:
        ask(link, Frame("ended"), deadline=2)
        site.join(20)
        assert not site.is_alive()


def test_a_key_that_is_not_approved_ends_with_advice(place: Place) -> None:
    key = read_private(place.folder / "b")[1]
    with place.server() as link, pytest.raises(FederationError, match="does not know this site's key") as refused:
        attend(place.invitation, key, echo, soon())
    assert list(link.get_nodes()) == []
    assert "florana flower approve" in refused.value.fix


def test_a_clock_that_is_off_ends_with_advice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime as dt

    import flwr.supernode.node_auth_http_interceptor as signing

    monkeypatch.setattr(signing, "now", lambda: dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
    monkeypatch.setattr(node_of, "clock_difference", lambda invitation: 3600.0)
    with place.server(), pytest.raises(FederationError, match="does not accept this site's signature") as refused:
        attend(place.invitation, read_private(place.folder / "a")[1], echo, soon())
    assert "3600 seconds ahead" in refused.value.why


@pytest.mark.parametrize("damage", ["cut", "head", "tensors", "other", "unreadable"])
def test_a_damaged_kept_answer_is_made_anew(tmp_path: Path, damage: str) -> None:
    made, kept = [], tmp_path / "kept" / "answer"

    def train(frame: Frame) -> Frame:
        made.append(frame)
        return Frame("reply", {"reply": {"n": len(made)}, "nonce": frame.fields["nonce"]}, b"tensors")

    request = Frame("train", {"brief": {"round": 3}, "nonce": "a"}, b"payload")
    assert remembered(train, request, kept) == remembered(train, request, kept)
    assert len(made) == 1
    content = kept.read_bytes()
    if damage == "unreadable":
        kept.unlink()
        kept.mkdir()  # and it cannot be written either
    else:
        kept.write_bytes(
            {
                "cut": content[:-1],
                "head": content.replace(b'"n": 1', b'"n": 2'),
                "tensors": content.replace(b"tensors", b"tensorz"),
                "other": b"[1]\n" + content,
            }[damage]
        )
    assert remembered(train, request, kept) == Frame("reply", {"reply": {"n": 2}, "nonce": "a"}, b"tensors")
    assert kept.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [{"brief": {"round": 4}}, {"run": "other"}, {"card": "other"}, {"payload": b"other"}, {"kind": "hello"}],
    ids=str,
)
def test_another_request_gets_no_kept_answer(tmp_path: Path, change: dict[str, Any]) -> None:
    fields = {"brief": {"round": 3}, "run": "r", "card": "c", "nonce": "a"}
    remembered(lambda frame: Frame("reply", {"nonce": "a"}, b"old"), Frame("train", fields, b"p"), tmp_path / "kept")
    named = {**fields, **{name: value for name, value in change.items() if name in fields}}
    other = Frame(change.get("kind", "train"), named, change.get("payload", b"p"))
    assert remembered(lambda frame: Frame("new"), other, tmp_path / "kept") == Frame("new")


def test_nobody_asks_or_answers_in_anothers_name(place: Place) -> None:
    """Every request of the fleet API, for the node of `a`: by a key that is not approved, and by another's."""
    approve(place.files, place.folder / "b" / "b.pub")
    a_request = {
        "PullMessages": PullMessagesRequest,
        "PushMessages": PushMessagesRequest,
        "PullObject": PullObjectRequest,
        "PushObject": PushObjectRequest,
        "ConfirmMessageReceived": ConfirmMessageReceivedRequest,
        "SendNodeHeartbeat": SendNodeHeartbeatRequest,
        "GetRun": GetRunRequest,
        "GetFab": GetFabRequest,
    }
    stranger = generate_key_pairs()
    private = load_ssh_private_key((place.folder / "b" / "b.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    with place.server() as link, place.site(echo):
        node = online(link)
        for keys in (stranger, (private, private.public_key())):
            authority = place.files.authority.read_bytes()
            signed = [NodeAuthHttpInterceptor(*keys)]
            with node_of.FleetHttpClient.from_server_address(
                f"127.0.0.1:{place.port}", False, authority, signed
            ) as client:
                calls = [(name, kind(node=Node(node_id=node))) for name, kind in a_request.items()]
                calls += [("DeactivateNode", DeactivateNodeRequest(node_id=node))]
                calls += [("UnregisterNode", UnregisterNodeFleetRequest(node_id=node))]
                for name, request in calls:
                    with pytest.raises(httpx.HTTPStatusError) as refused:
                        getattr(client, name)(request)
                    assert refused.value.response.status_code in (401, 412), name
                fresh = RegisterNodeFleetRequest(public_key=public_key_to_bytes(keys[1]))
                with pytest.raises(httpx.HTTPStatusError) as refused:
                    client.RegisterNode(fresh)
                assert refused.value.response.status_code in (400, 403, 409, 412)
        assert ask(link, ECHO) == Frame("reply", ECHO.fields, ECHO.payload), "and a never noticed"


def test_nobody_speaks_for_the_run(place: Place) -> None:
    """There is no token for it, so it neither expires nor can anybody use one."""
    link, app = make_link(read_roster(place.files.roster).keys)
    state: Any = link.state
    assert (state.task_token_store, state.task_token_to_task_id) == ({}, {})
    (run,) = state.get_run_info(run_ids=[link.run])
    assert run.status.status == "running"
    paths = set(app.openapi()["paths"])
    assert paths
    assert all(path.startswith("/v1/fleet/") for path in paths)
