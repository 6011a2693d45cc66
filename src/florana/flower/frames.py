"""One message as a person would write it down: a kind, a few named values, and one byte string of tensors.

Only the standard library is imported here: Flower starts a fresh process for every message, and that process needs no
more than this to hand the message to the resident trainer.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_HEAD = struct.Struct(">4sIQ")
_MAGIC = b"flr1"
MAX_FIELDS = 64 * 2**20
"""Bytes of the named values; a frame that claims more is refused before it is read."""


@dataclass(frozen=True)
class Frame:
    """A message between server and site.

    Args:
        kind: `hello`, `train`, `reply` or `failure`.
        fields: named values that JSON can say.
        payload: tensors, as `federation.messages.pack` made them.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes = b""

    def head(self) -> str:
        """Kind and fields as one JSON text."""
        return json.dumps({"kind": self.kind, "fields": dict(self.fields)})


def from_head(head: str, payload: bytes) -> Frame:
    """The frame whose `head` this is. Raises ValueError for anything else."""
    content = json.loads(head)
    if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
        raise ValueError("a message without a kind")
    fields = content.get("fields")
    if not isinstance(fields, dict):
        raise ValueError("a message whose fields are no table")
    return Frame(content["kind"], fields, payload)


def send(channel: socket.socket, frame: Frame) -> None:
    """Write one frame to a stream socket."""
    head = frame.head().encode()
    channel.sendall(_HEAD.pack(_MAGIC, len(head), len(frame.payload)) + head)
    if frame.payload:  # an empty write fails where the other side has answered and gone already
        channel.sendall(frame.payload)


def receive(channel: socket.socket, limit: int) -> Frame | None:
    """Read one frame; None where the other side has closed.

    Raises:
        ValueError: other bytes than a frame, a payload above `limit` bytes, or an end in the middle.
    """
    first = channel.recv(1)
    if not first:
        return None
    magic, head, payload = _HEAD.unpack(first + _exactly(channel, _HEAD.size - 1))
    if magic != _MAGIC or head > MAX_FIELDS:
        raise ValueError("these bytes are no message of florana")
    if payload > limit:
        raise ValueError(f"a message of {payload} bytes; the limit is {limit}")
    return from_head(_exactly(channel, head).decode(), _exactly(channel, payload))


def _exactly(channel: socket.socket, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        part = channel.recv(min(count - len(content), 2**20))
        if not part:
            raise ValueError(f"the message ends after {len(content)} of {count} bytes")
        content += part
    return bytes(content)
