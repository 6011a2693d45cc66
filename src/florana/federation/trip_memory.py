"""What a client keeps between the trips of a round: its update, and what it had been sent.

    update/<name>, received/<name>      among the rest of its client state, by the names of `Adapter.tensors`

They stay until the next round's take their place, so that a server that was begun anew can ask again; a checkpoint does
not hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from florana.errors import FloranaError
from florana.federation import quantize
from florana.federation.error_feedback import FEEDBACK
from florana.federation.messages import Brief, question_in
from florana.lora.factors import Adapter, adapter_from_tensors, kind_of
from florana.strategy.base import Named, Sums

UPDATE, RECEIVED = "update/", "received/"

LOSS, _ROUND = "loss", "round"
"""What else is kept of it: the client's mean training loss; the round, and which attempt of it."""


def update_of(
    received: Adapter, trained: Adapter, loss: float = 0.0, when: tuple[int, int] = (0, 0)
) -> dict[str, Tensor]:
    """What is kept of a round's training: both without the tensors that stay with the client.

    Args:
        received: what it was sent.
        trained: what training made of it.
        loss: of the training.
        when: the round, and which attempt of it.
    """
    before = {RECEIVED + name: tensor for name, tensor in received.tensors().items() if name in trained.tensors()}
    after = {UPDATE + name: tensor for name, tensor in trained.tensors().items()}
    return before | after | {UPDATE + LOSS: torch.tensor([loss]), UPDATE + _ROUND: torch.tensor(when)}


def loss_in(memory: Named) -> float:
    """The training loss of the update that is kept."""
    return float(memory[UPDATE + LOSS])


def when_in(memory: Named) -> tuple[int, ...]:
    """The round of the update that is kept, and which attempt of it; empty where none is."""
    return tuple(int(number) for number in memory[UPDATE + _ROUND]) if UPDATE + _ROUND in memory else ()


def update_in(memory: Named, scalings: Mapping[str, float]) -> tuple[Adapter, Adapter] | None:
    """(received, trained) as a client keeps them; None where it keeps no update."""
    both = [{n.removeprefix(p): t for n, t in memory.items() if n.startswith(p)} for p in (RECEIVED, UPDATE)]
    if not all(both):
        return None
    return adapter_from_tensors(both[0], scalings), adapter_from_tensors(both[1], scalings)


def own(memory: Named) -> dict[str, Tensor]:
    """Of what a client keeps, what completes a broadcast."""
    return {n: t for n, t in memory.items() if not n.startswith((FEEDBACK, UPDATE, RECEIVED))}


def lasting(memories: Mapping[str, Named]) -> dict[str, dict[str, Tensor]]:
    """Clients' memories without what they keep between trips only."""
    return {
        client: left
        for client, memory in memories.items()
        if (left := {n: t for n, t in memory.items() if not n.startswith((UPDATE, RECEIVED))})
    }


@dataclass(frozen=True, eq=False)
class Measured:
    """A client's answer to one trip.

    Args:
        content: the safetensors bytes.
        metrics: of a quantized uplink, `uplink_error`: how far what arrives is from what was measured, relative to what
            training changed.
        feedback: what rounding left out of the tensors trained whole, for the next round; see `error_feedback`.
    """

    content: bytes
    metrics: Mapping[str, float]
    feedback: Mapping[str, Tensor]


def measured(brief: Brief, sums: Sums | None, memory: Named) -> Measured:
    """The answer to one trip, from the update that is kept.

    Args:
        brief: what the client was asked.
        sums: of the strategy that its own recipe names.
        memory: what it keeps, the update among it.

    Raises:
        FloranaError: the strategy asks for no sums, or for fewer; or no update is kept.
    """
    if sums is None or brief.trip is None or not 0 <= brief.trip < sums.trips:
        raise FloranaError("is asked for a sum that the strategy of its own recipe does not know")
    both = update_in(memory, brief.scalings)
    if both is None:
        raise FloranaError(f"keeps no update of round {brief.round}: it was started anew since")
    question = question_in(brief.payload)
    tensors = sums.measure(brief.trip, brief.round, question, both[0], both[1])
    if brief.uplink == "float32":
        return Measured(save({name: tensor.contiguous() for name, tensor in tensors.items()}), {}, {})
    before = sums.measure(brief.trip, brief.round, question, both[0], both[0])
    carries = {n for n in tensors if kind_of(n) in brief.feedback}
    left = {n: memory[FEEDBACK + n].double() if FEEDBACK + n in memory else 0.0 for n in carries}
    wanted = {n: tensor.double() + left[n] if n in carries else tensor for n, tensor in tensors.items()}
    written = quantize.written(wanted, before, brief.uplink)
    content = save({name: tensor.contiguous() for name, tensor in written.items()})
    there = quantize.read(written, before, brief.uplink)
    missed = math.hypot(*(float((there[n].double() - tensor.double()).norm()) for n, tensor in tensors.items()))
    moved = math.hypot(*(float((tensor.double() - before[n].double()).norm()) for n, tensor in tensors.items()))
    rest = {FEEDBACK + n: (wanted[n] - there[n].double()).float().nan_to_num(0.0, 0.0, 0.0) for n in carries}
    return Measured(content, {"uplink_error": missed / moved if moved > 0 else 0.0}, rest)
