"""What a client keeps between the trips of a round: its update, and what it had been sent.

    update/<name>, received/<name>      among the rest of its client state, by the names of `Adapter.tensors`

They stay until the next round's take their place, so that a server that was begun anew can ask again; a checkpoint does
not hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from florana.errors import FloranaError
from florana.federation import quantize
from florana.federation.error_feedback import FEEDBACK
from florana.federation.messages import Brief, question_in
from florana.lora.factors import Adapter, adapter_from_tensors
from florana.strategy.base import Named, Sums

UPDATE, RECEIVED = "update/", "received/"


def update_of(received: Adapter, trained: Adapter) -> dict[str, Tensor]:
    """What is kept of a round's training: both without the tensors that stay with the client."""
    before = {RECEIVED + name: tensor for name, tensor in received.tensors().items() if name in trained.tensors()}
    return before | {UPDATE + name: tensor for name, tensor in trained.tensors().items()}


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


def measured(brief: Brief, sums: Sums | None, memory: Named) -> tuple[bytes, dict[str, float]]:
    """The answer to one trip, from the update that is kept; and, of a quantized uplink, how far what arrives is from
    what was measured, relative to what training changed (`uplink_error`).

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
    tensors, before = (
        sums.measure(brief.trip, brief.round, question, both[0], adapter) for adapter in (both[1], both[0])
    )
    written = quantize.written(tensors, before, brief.uplink)
    content = save({name: tensor.contiguous() for name, tensor in written.items()})
    if brief.uplink == "float32":
        return content, {}
    there = quantize.read(written, before, brief.uplink)
    missed = math.hypot(*(float((there[n].double() - tensor.double()).norm()) for n, tensor in tensors.items()))
    moved = math.hypot(*(float((tensor.double() - before[n].double()).norm()) for n, tensor in tensors.items()))
    return content, {"uplink_error": missed / moved if moved > 0 else 0.0}
