"""A site's connection to the server, by Flower's own client of the fleet API: asked, answered, nothing else.

A SuperNode of Flower fetches the code of the app that sends a message, and keeps what it got for other programs of its
machine, at a port. A site has no use for either: this process, which holds the model, asks for messages itself. Code is
never fetched, so there is none to run; no port is opened, and no program is started.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError

from florana.displayable import log
from florana.errors import FederationError
from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame
from florana.flower.deploy.bounded_answers import BoundedAnswers
from florana.flower.deploy.gateway import trusting
from florana.flower.deploy.invitation import Invitation
from florana.flower.deploy.reachability import clock_difference, in_words

Asked = TypeVar("Asked")
Told = TypeVar("Told")

ASKS_AGAIN = 0.5
"""Seconds between two questions for work, at least; florana's server holds a question until there is some."""
TRIES_AGAIN = 1.0
LOOKS_AGAIN = 0.05
BREAKS = 5
"""So many broken connections one part of a request may cost before all of it is fetched anew."""
BEATS = 10.0
CLOCK_SECONDS = 240.0
_SIGNATURE, _UNKNOWN, _TOO_LARGE = 401, 412, 413


@dataclass(frozen=True, eq=False)
class Line:
    """An open line to the server: Flower's client, and the node that the server takes this site for."""

    client: FleetHttpClient
    node: Node


def attend(
    invitation: Invitation,
    key: Path,
    answer: Callable[[Frame], Frame],
    done: threading.Event,
    say: Callable[[str], None] = lambda text: None,
    ends: Collection[str] = (),
    most: int = 2**30,
) -> None:
    """Answer the server's requests until `done` is set; wait for the server where it is away.

    Args:
        invitation: where the server is, and its authority.
        key: the site's private key.
        answer: the reply to one request; an error of it ends the site.
        done: ends the loop when it is set.
        say: told what a person at the site should see.
        ends: kinds of answers after which `done` is set.
        most: bytes that a request may have, see `bounded_answers`.

    Raises:
        FederationError: the server's certificate does not hold, it does not know this key, or its answers are not ones
            that a site takes.
    """
    private = load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    authority = invitation.authority.read_bytes()
    away, met = False, False
    signing = NodeAuthHttpInterceptor(private, private.public_key())
    with (
        httpx.Client(verify=trusting(invitation.authority)) as asking,
        FleetHttpClient.from_server_address(
            invitation.address, False, authority, [signing, BoundedAnswers(asking, most)]
        ) as client,
    ):
        while not done.is_set():
            try:
                clock_difference(invitation)  # its errors say what is wrong with a certificate
                with _present(client, public_key_to_bytes(private.public_key())) as line:
                    if away:
                        say("the server is there again" if met else "the server is there")
                    away, met = False, True
                    _attend(line, answer, done, say, ends)
            except httpx.HTTPStatusError as error:
                _judge(error, invitation)
            except (httpx.TransportError, OSError, ValueError) as error:
                strange = isinstance(error.__cause__, DecodeError)  # a proxy's page, say
                if isinstance(error, ValueError) and not strange:
                    raise
                if not away:
                    why = "something else answers" if strange else getattr(error, "strerror", None)
                    why = why or type(error).__name__
                    say(f"the server is not there ({why}); waiting for it")
                away = True
            done.wait(TRIES_AGAIN)


def _judge(error: httpx.HTTPStatusError, invitation: Invitation) -> None:
    """Raise what cannot be repaired by trying again; the rest is a server that was started anew, or is about to be."""
    status, path = error.response.status_code, error.request.url.path
    if not path.endswith("/activate-node"):
        return
    if status == _UNKNOWN:
        raise FederationError(
            "the server does not know this site's key",
            why="the operator has not approved it, or approved another key in this site's name",
            fix="send the operator this site's .pub file for 'florana flower approve', and join again",
        )
    if status == _SIGNATURE:
        off = clock_difference(invitation)
        raise FederationError(
            "the server does not accept this site's signature",
            why=f"this machine's clock is {in_words(off)}" if abs(off) > CLOCK_SECONDS else "",
            fix="set the clock right (signatures hold for five minutes), and join again",
        )


@contextmanager
def _present(client: FleetHttpClient, public: bytes) -> Iterator[Line]:
    """Be there for the server: it hears every ten seconds that this site lives, and at once when it leaves."""
    said = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL))
    line, left = Line(client, Node(node_id=said.node_id)), threading.Event()
    beating = threading.Thread(target=_beat, args=(line, left), daemon=True)
    beating.start()
    broken = False
    try:
        yield line
    except (httpx.HTTPError, OSError):
        broken = True  # this site comes back: the server goes on waiting for its answer
        raise
    finally:
        left.set()
        if not broken:
            with contextlib.suppress(httpx.HTTPError, FederationError):  # the server will miss the next heartbeats
                client.DeactivateNode(DeactivateNodeRequest(node_id=line.node.node_id))


def _beat(line: Line, left: threading.Event) -> None:
    request = SendNodeHeartbeatRequest(node=line.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    while not left.wait(BEATS):
        try:
            line.client.SendNodeHeartbeat(request)
        except (httpx.HTTPError, ValueError, FederationError):
            log.info("a heartbeat did not reach the server")  # whoever asks next finds out what is wrong


def _attend(
    line: Line,
    answer: Callable[[Frame], Frame],
    done: threading.Event,
    say: Callable[[str], None],
    ends: Collection[str],
) -> None:
    waiting = False
    while not done.is_set():
        got = line.client.PullMessages(PullMessagesRequest(node=line.node))
        asked = _whole(line, got, done.wait) if got.messages_list else None
        if asked is None:
            if not waiting:
                say("connected; waiting for the server to ask (it begins when enough sites are there)")
            waiting = True
            done.wait(ASKS_AGAIN)
            continue
        frame = _answered(asked, answer)
        # the last answer is news for a server that may be gone by now: it is sent once
        pause = (lambda seconds: True) if frame.kind in ends else done.wait
        try:
            waited_for = _sent(line, Message(to_record(frame), reply_to=asked), pause)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != _TOO_LARGE:
                raise
            reason = Frame("failure", {"reason": f"its answer is too large: {error.response.text[:100]}"})
            waited_for = _sent(line, Message(to_record(reason), reply_to=asked), pause)
        if frame.kind in ends:
            done.set()
        elif not waited_for and not done.is_set():
            say("the server does not wait for this answer any more")


def _whole(line: Line, got: PullMessagesResponse, pause: Callable[[float], bool]) -> Message | None:
    """The request with all that belongs to it; None where the server has taken it back."""
    if len(got.message_object_trees) != len(got.messages_list):
        log.warning("a request could not be read: its parts are not named")
        return None
    tree, run = got.message_object_trees[0], got.messages_list[0].metadata.run_id
    pull = make_pull_object_fn_protobuf(_persistent(line.client.PullObject, pause), line.node, run)
    heard = _persistent(line.client.ConfirmMessageReceived, pause)
    confirm = make_confirm_message_received_fn_protobuf(heard, line.node, run)
    try:
        message = pull_and_inflate_object_from_tree(
            tree, pull, confirm, return_type=Message, initial_backoff=LOOKS_AGAIN, max_time=60.0
        )
    except (ObjectPullError, TypeError, LookupError, ValueError) as error:
        log.warning("a request could not be read: %s", error)
        return None
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def _persistent(ask: Callable[[Asked], Told], pause: Callable[[float], bool]) -> Callable[[Asked], Told]:
    """The same call, over a few broken connections: a request has many parts, and none is fetched twice."""

    def asked(request: Asked) -> Told:
        for _ in range(BREAKS):
            try:
                return ask(request)
            except httpx.TransportError:
                if pause(TRIES_AGAIN):
                    raise
        return ask(request)

    return asked


def _answered(asked: Message, answer: Callable[[Frame], Frame]) -> Frame:
    try:
        frame = from_record(asked.content)
    except (ValueError, TypeError, KeyError) as error:
        return Frame("failure", {"reason": f"could not read the request: {error}"})
    return answer(frame)


def _sent(line: Line, reply: Message, pause: Callable[[float], bool]) -> bool:
    """Send the whole of an answer, over as many broken connections as `pause` waits for (it returns True where it is
    time to stop); False where nobody waits for the answer."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    run = reply.metadata.run_id
    with no_object_id_recompute():
        request = PushMessagesRequest(
            node=line.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
        )
        while True:
            try:
                told = line.client.PushMessages(request)
                if not told.objects_to_push:
                    return False
                push = make_push_object_fn_protobuf(line.client.PushObject, line.node, run, told.session_id)
                push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(told.objects_to_push))
                return True
            except (httpx.TransportError, ObjectPushError):
                if pause(TRIES_AGAIN):
                    return False
