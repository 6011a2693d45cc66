"""One message as a person would write it down: a kind, a few named values, and one byte string of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from florana.bounded import json_of


@dataclass(frozen=True)
class Frame:
    """A message between server and site.

    Args:
        kind: `hello`, `train`, `reply`, `sealed` (a step of a secure sum) or `failure`.
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
    content = json_of(head)
    if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
        raise ValueError("a message without a kind")
    fields = content.get("fields")
    if not isinstance(fields, dict):
        raise ValueError("a message whose fields are no table")
    return Frame(content["kind"], fields, payload)
