"""What crosses between server and client, and the two interfaces that carry it.

A message is a few plain fields and one byte string: the tensors, as safetensors. The local engine sends the very
bytes a network would, so the bytes counted are the bytes sent, and no client can touch another's tensors.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from florana.errors import BudgetSpent, FloranaError, InputError
from florana.federation.quantize import Format
from florana.lora.factors import Adapter, adapter_from_tensors, kind_of
from florana.strategy.base import Named, Pruning

_RESIDUAL = "residual/"
_QUESTION = "question/"


@dataclass(frozen=True)
class Brief:
    """The server's request to one client for one round.

    Args:
        round: counted from 1.
        client: whom it is for.
        seed: for everything random in this client's round.
        payload: the `pack`ed part of the adapter that travels, and the residual.
        evaluate: whether the client should also measure its own model.
        trains: kinds of tensors to train (see `strategy.base.Work`).
        returns: kinds of tensors to send back.
        scalings: module -> scaling of the adapter to train.
        blocks: the blocks of the cores to train and send back; None for all.
        pruning: the lower rank that the client may answer with, if any.
        uplink: how the tensors of the answer are written, see `federation.quantize`.
        feedback: kinds of tensors of which the client carries over what rounding left out, see
            `federation.error_feedback`.
        trip: of a method that works on sums (`strategy.base.Sums`), which of them is asked for, from 0; the client
            trains before the first. None: its update itself.
        sealed: the client trains and keeps its update; what it measures goes into sums that hide it.
        attempt: of such a round, which one, from 0.
    """

    round: int
    client: str
    seed: int
    payload: bytes
    evaluate: bool
    trains: Collection[str]
    returns: Collection[str]
    scalings: Mapping[str, float]
    blocks: Collection[int] | None = None
    pruning: Pruning | None = None
    uplink: Format = "float32"
    feedback: Collection[str] = field(default_factory=list)
    trip: int | None = None
    sealed: bool = False
    attempt: int = 0


@dataclass(frozen=True)
class Reply:
    """A client's answer, unchecked: see `gate.validate`.

    Args:
        client: who answers.
        round: the round that it answers.
        examples: how many training rows the client says it has.
        metrics: what it measured, by name.
        payload: safetensors bytes, untrusted.
        seconds: the client's own training time.
    """

    client: str
    round: int
    examples: int
    metrics: Mapping[str, float]
    payload: bytes
    seconds: float


@dataclass(frozen=True)
class Step:
    """One message of a secure sum, either way.

    Args:
        head: named values that JSON can say.
        payload: bytes beside them.
    """

    head: Mapping[str, Any]
    payload: bytes = b""

    @property
    def size(self) -> int:
        """In bytes."""
        return len(json.dumps(dict(self.head))) + len(self.payload)


@dataclass(frozen=True)
class Failure:
    """A client that could not answer, and why.

    Args:
        client: which one.
        reason: in its words.
        spent: it has no privacy budget left for another round.
    """

    client: str
    reason: str
    spent: bool = False


def failure_of(client: str, error: FloranaError) -> Failure:
    """What florana explains, as one line.

    Examples:
        >>> failure_of("a", FloranaError("there are no rows", fix="give it some")).reason
        'there are no rows; fix: give it some'
    """
    return Failure(client, str(error).replace("\n", "; "), isinstance(error, BudgetSpent))


class Engine(Protocol):
    """Carries briefs to clients and brings back what comes: each client's Reply or Failure, in any order.

    The iterator ends when nothing more will come; ending it by a deadline is the engine's business.
    """

    def fit(self, briefs: Sequence[Brief]) -> Iterator[Reply | Failure]:
        """Send each client its instructions; yield what comes back."""
        ...

    def exchange(self, steps: Mapping[str, Step]) -> Iterator[tuple[str, Step | Failure]]:
        """Send each client its step of a secure sum; yield each client's answer once, in any order."""
        ...

    def memories(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The client state, where the engine holds it: committed with the round."""
        ...

    def remember(self, client: str, memory: Mapping[str, Tensor]) -> None:
        """Take back the client state that a kept answer came with, where the engine holds any."""
        ...


def travelling(adapter: Adapter, kinds: Collection[str], blocks: Collection[int] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors of those kinds, and its extra tensors: what a message holds of it.

    Args:
        adapter: the adapter.
        kinds: of `A`, `B`, `core` and `scale`.
        blocks: the blocks of each core (h, k, k) to take, in ascending order; None for all.
    """
    kept = {name: t for name, t in adapter.tensors().items() if kind_of(name) in kinds or kind_of(name) == "extra"}
    if blocks is None:
        return kept
    return {name: t[sorted(blocks)] if kind_of(name) == "core" else t for name, t in kept.items()}


def completed(adapter: Adapter, tensors: Mapping[str, Tensor], blocks: Collection[int] | None = None) -> Adapter:
    """The adapter with what travelled in the place of its own tensors: what `travelling` left out stays.

    Args:
        adapter: the adapter before.
        tensors: name -> what travelled.
        blocks: the blocks of the cores that travelled; None for all.
    """
    known = adapter.tensors()
    for name, tensor in tensors.items():
        if blocks is not None and kind_of(name) == "core":
            whole = known[name].clone()
            whole[sorted(blocks)] = tensor
            known[name] = whole
        else:
            known[name] = tensor
    return adapter_from_tensors(known, adapter.scalings)


def pack(
    adapter: Adapter,
    kinds: Collection[str] = ("A", "B", "core"),
    residual: Adapter | None = None,
    blocks: Collection[int] | None = None,
    question: Named | None = None,
) -> bytes:
    """The tensors of those kinds (see `travelling`), and a frozen residual where there is one, as safetensors bytes.

    Args:
        adapter: the adapter.
        kinds: of `A`, `B`, `core` and `scale`.
        residual: the frozen part that goes along; its scalings must be 1, since they are not sent.
        blocks: as in `travelling`.
        question: what goes along for the first of a method's sums.
    """
    tensors = travelling(adapter, kinds, blocks)
    if residual is not None:
        tensors |= {_RESIDUAL + name: tensor for name, tensor in residual.tensors().items()}
    tensors |= {_QUESTION + name: tensor for name, tensor in (question or {}).items()}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def pack_question(question: Named) -> bytes:
    """What goes down before a later one of a method's sums.

    Examples:
        >>> import torch
        >>> question_in(pack_question({"range/q": torch.ones(1)}))["range/q"].tolist()
        [1.0]
    """
    return save({_QUESTION + name: tensor.contiguous() for name, tensor in question.items()})


def question_in(content: bytes) -> dict[str, Tensor]:
    """The question in bytes of a trusted side, of `pack` or `pack_question`."""
    return {n.removeprefix(_QUESTION): t for n, t in load(content).items() if n.startswith(_QUESTION)}


def unpack_whole(content: bytes, scalings: Mapping[str, float]) -> Adapter:
    """A whole adapter: the one that a client starts from, or the one that a run ends with.

    Raises:
        InputError: the bytes are no such adapter.
    """
    try:
        return adapter_from_tensors(load(content), scalings)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError("what was sent is no adapter", why=f"{type(error).__name__}: {error}") from None


def unpack(
    content: bytes, first: Adapter, own: Mapping[str, Tensor], scalings: Mapping[str, float]
) -> tuple[Adapter, Adapter | None]:
    """The adapter to train and the residual, from bytes of a trusted side.

    Args:
        content: the safetensors bytes.
        first: the adapter before the first round, which every client knows from the recipe.
        own: tensors the client kept from earlier rounds, by the names of `Adapter.tensors`.
        scalings: of the adapter to train.

    A tensor that did not travel is the client's own; else that of `first`, of which a client of a lower rank takes the
    first rows of A and columns of B.
    """
    tensors = load(content)
    frozen = {n.removeprefix(_RESIDUAL): t for n, t in tensors.items() if n.startswith(_RESIDUAL)}
    residual = adapter_from_tensors(frozen, {name.partition("/")[2]: 1.0 for name in frozen}) if frozen else None
    sent = {name: tensor for name, tensor in tensors.items() if not name.startswith(_RESIDUAL)}
    known = first.tensors() | dict(own) | sent
    for name in first.modules:
        A, B = f"A/{name}", f"B/{name}"
        rank = min(known[A].shape[0], known[B].shape[1])
        known[A], known[B] = known[A][:rank], known[B][:, :rank]
    return adapter_from_tensors(known, scalings), residual
