"""A Grid without a network: messages go straight to sites of this process, or to resident trainers by their sockets.

Everything else is the real thing: records, registration, engine, gate, journal, trainer.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame
from tests.flower_fake import identify
from tests.trainer import receive, send

Answer = Callable[[Frame], Frame]
"""What stands at the other end of a node."""


@dataclass
class Node:
    """What Flower tells of a node."""

    node_id: int
    public_key: bytes


@dataclass
class FakeGrid(Grid):
    """Nodes by number, each with its key and who answers.

    `tamper` may change the content of a reply on its way; `slow` says how many seconds a node takes. By the
    grid's clock sites take no time: it stands still while they work, so that no deadline depends on how fast they are.
    """

    nodes: Mapping[int, tuple[bytes, Answer]]
    tamper: Callable[[int, Frame, RecordDict], RecordDict | None] = lambda node, asked, content: content
    slow: Mapping[int, float] = field(default_factory=dict)
    sent: list[tuple[int, Frame]] = field(default_factory=list)
    bytes_up: dict[int, int] = field(default_factory=dict)
    _due: dict[str, tuple[float, Message]] = field(default_factory=dict)
    _worked: float = 0.0

    def __post_init__(self) -> None:
        identify()

    def monotonic(self) -> float:
        """The clock; `led` puts it in the place of the engine's."""
        return time.monotonic() - self._worked

    def set_run(self, run: Any) -> None:
        """Nothing to set."""

    @property
    def run(self) -> Any:
        """There is no run."""
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        """Deprecated in Flower."""
        raise NotImplementedError

    def get_nodes(self) -> Iterable[Any]:
        """All of them, online."""
        return [Node(number, key) for number, (key, _) in self.nodes.items()]

    def get_node_ids(self) -> Iterable[int]:
        """Their numbers."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Each is answered at once; the answer is held back as long as its node is slow."""
        identities = []
        for message in messages:
            began = time.monotonic()
            node, identity = message.metadata.dst_node_id, f"message-{len(self.sent)}"
            asked = from_record(message.content)
            self.sent.append((node, asked))
            identities.append(identity)
            content = self.tamper(node, asked, to_record(self.nodes[node][1](asked)))
            self._worked += time.monotonic() - began
            if content is not None:
                message.metadata.__dict__["_message_id"] = identity
                reply = Message(content, reply_to=message)
                self._due[identity] = (self.monotonic() + self.slow.get(node, 0.0), reply)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that are due."""
        now = self.monotonic()
        due = [name for name in message_ids if name in self._due and self._due[name][0] <= now]
        return [self._due.pop(name)[1] for name in due]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not used: the engine polls for itself."""
        raise NotImplementedError


def trainer_at(path: Path) -> Answer:
    """The resident trainer behind a socket."""

    def ask(frame: Frame) -> Frame:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(str(path))
            send(channel, frame)
            answer = receive(channel)
        assert answer is not None
        return answer

    return ask


def lead_with_trainers(recipe_path: str, out: str, roster: str, sockets: str) -> None:
    """The server's part of a run, in a process that a test can kill: the trainers live elsewhere."""
    from florana.flower.app.server_app import lead
    from florana.flower.app.settings import Settings
    from florana.flower.deploy.roster import read_roster
    from florana.recipe.load import read_recipe

    keys = read_roster(Path(roster)).keys
    nodes = {n + 1: (keys[name], trainer_at(Path(sockets) / name)) for n, name in enumerate(sorted(keys))}
    settings = Settings(out=out, resume=True, roster=roster, deadline=60, wait=5, base=False)
    lead(FakeGrid(nodes), read_recipe(Path(recipe_path)), settings, Path(out), lambda event: None)


def trainer_process(recipe_path: str, who: str, sockets: str, kept: str) -> None:
    """One site's resident trainer, in a process that a test can kill."""

    from florana.flower.app.site import site_of
    from florana.recipe.load import read_recipe
    from florana.runs.prepared import prepare
    from tests.trainer import answer_until, listening

    recipe = read_recipe(Path(recipe_path))
    site = site_of(recipe, prepare(recipe), who, Path(kept))
    with listening() as listener:
        link = Path(sockets) / who
        link.with_suffix(".new").symlink_to(listener.path)
        link.with_suffix(".new").replace(link)
        answer_until(listener, site.answer, threading.Event())
