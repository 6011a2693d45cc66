"""Briefs and replies as frames, and back; what comes from a client is taken apart with suspicion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from florana.federation.messages import Brief, Failure, Reply, Step
from florana.flower.app.frames import Frame
from florana.secure.session_keys import Refused
from florana.strategy.base import Pruning


def brief_frame(brief: Brief, run: str, nonce: str, card: str) -> Frame:
    """A brief, with the run it belongs to, a word that the answer must repeat, and the digest of the client's card."""
    named = {f.name: _plain(getattr(brief, f.name)) for f in fields(Brief) if f.name != "payload"}
    return Frame("train", {"brief": named, "run": run, "nonce": nonce, "card": card}, brief.payload)


def read_brief(frame: Frame) -> Brief:
    """The brief in a frame of the server."""
    named = dict(frame.fields["brief"])
    pruning = named.pop("pruning", None)
    return Brief(**named, payload=frame.payload, pruning=Pruning(**pruning) if pruning else None)


def reply_frame(reply: Reply, nonce: str) -> Frame:
    """A reply, with the word of the brief that it answers."""
    named = {f.name: _plain(getattr(reply, f.name)) for f in fields(Reply) if f.name != "payload"}
    return Frame("reply", {"reply": named, "nonce": nonce}, reply.payload)


def sealed_frame(step: Step, run: str, nonce: str, card: str = "") -> Frame:
    """A step of a secure sum, either way, with the word that ties question and answer together."""
    return Frame("sealed", {"step": dict(step.head), "run": run, "nonce": nonce, "card": card}, step.payload)


def step_in(frame: Frame) -> Step:
    """The step in a frame of the server. Raises Refused where there is none."""
    head = frame.fields.get("step")
    if not isinstance(head, dict):
        raise Refused("is sent a step of a secure sum that is none")
    return Step(head, frame.payload)


def read_sealed(frame: Frame, client: str, nonce: str) -> Step | Failure:
    """A client's answer to a step of a secure sum, or why it is none. Raises nothing.

    Args:
        frame: what the node sent; untrusted.
        client: whom the server asked.
        nonce: the word that the step went out with.
    """
    if frame.kind != "sealed":
        failed = read_reply(frame, client, nonce)
        return failed if isinstance(failed, Failure) else Failure(client, "answered with an update, unasked")
    if frame.fields.get("nonce") != nonce or not isinstance(frame.fields.get("step"), dict):
        return Failure(client, "answered another step than the one it got")
    return Step(frame.fields["step"], frame.payload)


def failure_frame(reason: str, spent: bool = False) -> Frame:
    """A client that could not answer; `spent`: it has no privacy budget left."""
    return Frame("failure", {"reason": reason} | ({"spent": True} if spent else {}))


def read_reply(frame: Frame, client: str, nonce: str) -> Reply | Failure:
    """What a client sent, as a Reply for the gate, or a Failure that says why it is none. Raises nothing.

    Args:
        frame: what the node sent; untrusted.
        client: whom the server asked; a node answers in its own name only.
        nonce: the word the brief went out with.
    """
    if frame.kind == "failure":
        reason = str(frame.fields.get("reason", ""))[:1000] or "failed without a reason"
        return Failure(client, reason, frame.fields.get("spent") is True)
    if frame.kind == "changed":
        return Failure(
            client,
            "is not as it was at registration (another recipe, data, model or number of threads): it is asked anew",
        )
    if frame.kind != "reply":
        return Failure(client, f"answered with a message of kind '{frame.kind[:40]}'")
    if frame.fields.get("nonce") != nonce:
        return Failure(client, "answered another request than the one it got (an old answer sent again?)")
    named = frame.fields.get("reply")
    if not isinstance(named, dict) or named.keys() != {f.name for f in fields(Reply)} - {"payload"}:
        return Failure(client, "answered without the fields of a reply")
    if named["client"] != client:
        return Failure(client, f"answers in the name of '{str(named['client'])[:80]}'")
    metrics = named["metrics"]
    if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
        return Failure(client, "reports metrics that are no numbers")
    if not _is_number(named["seconds"]):
        return Failure(client, "reports seconds that are no number")
    return Reply(**named, payload=frame.payload)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Records, mappings and collections as JSON knows them."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return [_plain(item) for item in value]
