"""A finished update is kept until the server asks for another: a broken line or a resumed server costs no training.

A server that was killed before it had committed a round asks for the same again, byte for byte but for the word of the
request. Then the update that was made for it is sent, with the new word.

    FILE    one line of JSON (digest of the request, digest of the update, its named values), then the update's tensors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from florana.atomic_files import replace_file
from florana.bounded import json_of
from florana.displayable import log
from florana.flower.app.frames import Frame

_WORD = "nonce"


def remembered(answer: Callable[[Frame], Frame], frame: Frame, kept: Path) -> Frame:
    """The answer to a request: the kept one, where it was made for just this request, else a new one, which is kept.

    Args:
        answer: makes an answer.
        frame: a request of the server.
        kept: the file, which need not exist. One that cannot be read or written is no reason not to answer.

    Example:
        Examples:
            >>> import tempfile
            >>> made = []
            >>> def answer(frame: Frame) -> Frame:
            ...     made.append(frame)
            ...     return Frame("reply", {"reply": {}, "nonce": frame.fields["nonce"]}, b"tensors")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     first = remembered(answer, Frame("train", {"nonce": "a"}), Path(folder) / "answer")
            ...     again = remembered(answer, Frame("train", {"nonce": "b"}), Path(folder) / "answer")
            >>> first.fields["nonce"], again.fields["nonce"], again.payload, len(made)
            ('a', 'b', b'tensors', 1)
    """
    if frame.kind != "train":
        return answer(frame)
    asked = _digest({name: value for name, value in frame.fields.items() if name != _WORD}, frame.payload)
    known = _read(kept, asked)
    if known is not None:
        return Frame(known.kind, {**known.fields, _WORD: frame.fields.get(_WORD)}, known.payload)
    made = answer(frame)
    if made.kind == "reply":
        head = {"asked": asked, "made": _digest(made.fields, made.payload), "fields": dict(made.fields)}
        try:
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(kept, json.dumps(head).encode() + b"\n" + made.payload)
        except OSError as error:
            log.warning("%s: the update is sent, but it could not be kept (%s)", kept, error.strerror)
    return made


def _read(kept: Path, asked: str) -> Frame | None:
    try:
        head, _, payload = kept.read_bytes().partition(b"\n")
        said = json_of(head)
        if said["asked"] == asked and said["made"] == _digest(said["fields"], payload):
            return Frame("reply", said["fields"], payload)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _digest(fields: object, payload: bytes) -> str:
    """sha256 of named values and tensors."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode() + b"\n" + payload).hexdigest()
