"""Flower's fleet API in this process: the one part of a SuperLink that a federation needs.

A whole SuperLink also serves an API that starts whatever program it is given, and one by which such programs speak. It
asks nobody who they are: every account of the machine that reaches its port can use both. Here neither exists. What is
served are Flower's own handlers for nodes, which check each node's signature; the rounds are led by this process, which
reads and writes the same state in memory. No port but the gateway's is opened, and no program is started.

The state holds one run of one start. After a kill nothing of it is left, so no answer to an old question can count.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fastapi import FastAPI
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, PushMessagesRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

PATIENCE = 15.0
"""Seconds for a node that is offline to come back to what it was asked: it was started anew, or this machine slept."""
LOG_BYTES = 2**20
"""Of Flower's own log, twice at most: what anybody sends may be named in it."""


@dataclass(eq=False)
class Link:
    """The server's way to its nodes: puts requests where the fleet API finds them, takes the answers from there.

    It has the methods of a Flower Grid that `flower_engine.exchange` and `registration.Registration` use.

    Args:
        state: Flower's state.
        run: the id of the one run in it.
        asked: counts the requests that were put there, by which the gateway knows when to look for one.
    """

    state: InMemoryLinkState
    run: int
    asked: int = 0
    _waiting: dict[int, Message] = field(default_factory=dict)
    """Node -> the request that it was sent last, until it is answered."""
    _away: dict[str, float] = field(default_factory=dict)
    """Request -> when its node was first found to be offline."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The approved nodes that are online."""
        return self.state.get_node_info(node_ids=list(self.state.get_nodes(self.run)))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put requests there; the id of each, empty where it was not taken.

        A node is asked one thing at a time: what it was asked before, and has not answered, is taken back.
        """
        identities = []
        self.state.delete_sessions_in_run(self.run)  # of answers that came too late
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                node = message.metadata.dst_node_id
                with self._lock:
                    if (before := self._waiting.pop(node, None)) is not None:
                        self._forget(before.metadata.message_id)
                    identities.append(self._put(message))
                    self._waiting[node] = message
        self.asked += 1
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to these requests that are there as a whole; an error where a node has been away for a while."""
        asked = set(message_ids)
        # Flower, asked for it, would say of the answer of a node that has left since that the node is not there
        whole = {request for request in asked if self._is_whole(request)}
        silent = {request for request in asked - whole if self._answer_to(request) is None}
        found = self.state.get_message_res(message_ids=set(silent), run_id=self.run) if silent else []
        errors = [answer for answer in found if answer.has_error()]
        for request in asked - {error.metadata.reply_to_message_id for error in errors}:
            self._away.pop(request, None)
        answers = [self._taken(request) for request in sorted(whole)]
        for error in errors:
            request = error.metadata.reply_to_message_id
            self.state.object_store.delete(error.metadata.message_id)
            if time.monotonic() - self._away.setdefault(request, time.monotonic()) >= PATIENCE:
                answers.append(error)
                self._forget(request)
        return answers

    def offer_again(self, node: int) -> None:
        """Offer a node the request that it was sent last, unless the whole answer is there: it has lost it."""
        with self._lock, no_object_id_recompute():
            message = self._waiting.get(node)
            kept = self.state.message_ins_store.get(message.metadata.message_id) if message is not None else None
            if message is None or kept is None or not kept.metadata.delivered_at:
                return
            if self._is_whole(message.metadata.message_id):
                return
            self._drop_answer(message.metadata.message_id)
            kept.metadata.delivered_at = ""
            self._put(message)

    def begin_answer(self, node: int, answer: str) -> None:
        """A node sends an answer: of an earlier one of which only a part has come, nothing more will come."""
        with self._lock:
            request = self._waiting[node].metadata.message_id if node in self._waiting else ""
            before = self._answer_to(request)
            if before is not None and before != answer and not self._is_whole(request):
                self._drop_answer(request)

    def _put(self, message: Message) -> str:
        objects, session = get_all_nested_objects(message), self.state.start_session(self.run)
        bare = remove_content_from_message(message)
        taken, missing = self.state.store_message_and_object_tree(bare, get_object_tree(message), session)
        for name in missing:
            self.state.store_object(self.run, session, name, objects[name].deflate())
        return message.object_id if taken else ""

    def _answer_to(self, request: str) -> str | None:
        return self.state.message_ins_id_to_message_res_id.get(request)

    def _is_whole(self, request: str) -> bool:
        answer = self._answer_to(request)
        return answer is not None and all(self.state.object_store.get(name) for name in self._parts(answer))

    def _parts(self, answer: str) -> list[str]:
        tree = self.state.object_store.get_object_tree(answer)
        return [node.object_id for node in iterate_object_tree(tree)]

    def _taken(self, request: str) -> Message:
        """The whole answer to a request, which is forgotten with it."""
        name = str(self._answer_to(request))
        try:
            return self._inflated(name, self.state.message_res_store[name])
        finally:
            self._forget(request)

    def _inflated(self, name: str, answer: Message) -> Message:
        contents = {part: self.state.object_store.get(part) or b"" for part in self._parts(name)}
        whole = inflate_object_from_contents(name, contents)
        if not isinstance(whole, Message):
            raise ValueError("an answer that is no message")
        # what is inside may be written by anybody; what it answers was checked outside
        whole.metadata.__dict__["_reply_to_message_id"] = answer.metadata.reply_to_message_id
        return whole

    def _drop_answer(self, request: str) -> None:
        answer = self.state.message_ins_id_to_message_res_id.pop(request, None)
        if answer is not None:
            self.state.message_res_store.pop(answer, None)
            self.state.object_store.delete(answer)

    def _forget(self, request: str) -> None:
        """Take a request and its answer away."""
        self._away.pop(request, None)
        self._drop_answer(request)
        self.state.delete_messages({request})
        self.state.object_store.delete(request)


def make_link(keys: Mapping[str, bytes]) -> tuple[Link, FastAPI]:
    """A link to the nodes with these keys (client -> PEM), and the ASGI application that serves the nodes.

    Example:
        Examples:
            >>> link, app = make_link({})
            >>> list(link.get_nodes())
            []
            >>> any(path.startswith("/v1/control") for path in app.openapi()["paths"])
            False
    """
    factory = LinkStateFactory(
        FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
    )
    state = factory.state()
    assert isinstance(state, InMemoryLinkState)
    for pem in keys.values():
        state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, pem, HEARTBEAT_DEFAULT_INTERVAL)
    link = Link(state, _running(state))
    return link, _fleet_api(factory, link)


def _running(state: InMemoryLinkState) -> int:
    """A run without code that runs for as long as this process does."""
    run = state.create_run(
        fab_id="florana/run",
        fab_version="",
        fab_hash=None,
        override_config={},
        federation_id=NOOP_FEDERATION_ID,
        federation_config=None,
        flwr_aid=NOOP_FLWR_AID,
        primary_task_type=TaskType.SERVER_APP,
    )
    (task,) = state.get_tasks()
    state.claim_task(task.task_id)
    state.activate_task(task.task_id)
    # the token by which a program of its own would speak for the run, and without whose use the run would expire
    state.task_token_to_task_id.pop(state.task_token_store.pop(task.task_id).token)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, run, SUPERLINK_NODE_ID
    return run


def _fleet_api(factory: LinkStateFactory, link: Link) -> FastAPI:
    async def nothing_is_lost(request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Before a node is let in, or answers; its signature has been checked.

        A site that was killed, or whose connection broke, is let in again at once, not when its last heartbeat is a
        minute old, and gets what it was at work on or did not take to the end.
        """
        said, state = getattr(request.state, "protobuf_request", None), link.state
        if isinstance(said, PushMessagesRequest) and said.messages_list:
            link.begin_answer(said.node.node_id, said.messages_list[0].metadata.message_id)
        elif isinstance(said, ActivateNodeRequest):
            node = state.get_node_id_by_public_key(said.public_key)
            if node is not None:
                link.offer_again(node)
                if state.get_node_info(node_ids=[node], statuses=[NodeStatus.ONLINE]):
                    state.acknowledge_node_heartbeat(node, HEARTBEAT_DEFAULT_INTERVAL)
                    request.state.protobuf_response = ActivateNodeResponse(node_id=node)
                    return Response()
        return await call_next(request)

    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
            Middleware(BaseHTTPMiddleware, dispatch=nothing_is_lost),
        ],
    )
    app.state.linkstate_factory, app.state.enable_supernode_auth = factory, True
    app.include_router(fleet)
    return app


class _Log(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (a full disk is told of where it matters)
        """Nothing."""


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Flower's own log in a file, and not on the terminal."""
    log = logging.getLogger("flwr")
    before, level = list(log.handlers), log.level
    handler = _Log(path, maxBytes=LOG_BYTES, backupCount=1, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for other in before:
        log.removeHandler(other)
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.setLevel(level)
        for other in before:
            log.addHandler(other)
