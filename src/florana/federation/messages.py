"""What crosses between server and client, and the two interfaces that carry it.

A message is a few plain fields and one byte string: the tensors, as safetensors. The local engine sends the very
bytes a network would, so the bytes counted are the bytes sent, and no client can touch another's tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from safetensors.torch import load, save
from torch import Tensor

from florana.factors import Adapter, adapter_from_tensors
from florana.strategy.base import Payload

_RESIDUAL = "residual/"


@dataclass(frozen=True)
class Brief:
    """The server's request to one client for one round.

    Args:
        round: counted from 1.
        client: whom it is for.
        seed: for everything random in this client's round.
        payload: `pack`ed adapter (and residual).
        evaluate: whether the client should also measure its own model.
    """

    round: int
    client: str
    seed: int
    payload: bytes
    evaluate: bool


@dataclass(frozen=True)
class Reply:
    """A client's answer, unchecked: see `gate.admit`. `seconds` is the client's own training time."""

    client: str
    round: int
    examples: int
    metrics: Mapping[str, float]
    payload: bytes
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A client that could not answer, and why."""

    client: str
    reason: str


class Engine(Protocol):
    """Carries briefs to clients and brings back what comes: each client's Reply or Failure, in any order.

    The iterator ends when nothing more will come; ending it by a deadline is the engine's business.
    """

    def fit(self, briefs: Sequence[Brief]) -> Iterator[Reply | Failure]: ...

    def memories(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What clients keep to themselves between rounds, where the engine holds it: committed with the round."""
        ...


def pack(payload: Payload) -> bytes:
    """The tensors of an adapter and, where there is one, its frozen residual, as safetensors bytes."""
    tensors = payload.adapter.tensors()
    if payload.residual is not None:
        tensors |= {_RESIDUAL + name: tensor for name, tensor in payload.residual.tensors().items()}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def unpack(content: bytes, scalings: Mapping[str, float]) -> Payload:
    """The inverse of `pack`, for bytes from a trusted side; `scalings` comes from the model's configuration."""
    tensors = load(content)
    residual: Adapter | None = None
    frozen = {n.removeprefix(_RESIDUAL): t for n, t in tensors.items() if n.startswith(_RESIDUAL)}
    if frozen:
        residual = adapter_from_tensors(frozen, scalings)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_RESIDUAL)}
    return Payload(adapter_from_tensors(tensors, scalings), residual)
