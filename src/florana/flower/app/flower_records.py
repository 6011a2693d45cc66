"""Frames as Flower's records: the named values in a ConfigRecord, the tensors' bytes as one Array.

An Array carries any bytes: what the server's gate reads is what `federation.messages.pack` wrote, bf16 and all, and the
count of those bytes is the same in every engine.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from florana.flower.app.frames import Frame, from_head

HEAD, BODY = "florana", "tensors"
_STYPE = "florana.safetensors"


def to_record(frame: Frame) -> RecordDict:
    """The frame as the content of a Flower message."""
    array = Array(dtype="uint8", shape=(len(frame.payload),), stype=_STYPE, data=frame.payload)
    return RecordDict({HEAD: ConfigRecord({"head": frame.head()}), BODY: ArrayRecord({"payload": array})})


def from_record(content: RecordDict) -> Frame:
    """The frame in a Flower message's content. Raises ValueError where there is none."""
    config, arrays = content.config_records.get(HEAD), content.array_records.get(BODY)
    if config is None or arrays is None or not isinstance(head := config.get("head"), str):
        raise ValueError("a message that florana did not write")
    if list(arrays) != ["payload"] or arrays["payload"].stype != _STYPE:
        raise ValueError("a message with other arrays than florana's")
    return from_head(head, bytes(arrays["payload"].data))
