"""What a client sends in a quantized format, and what it keeps so that rounding does not accumulate over the rounds.

    sent:  Q(d + e)        d = trained - received        next  e <- (trained + e) - (what the server then holds)

This is error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847): what rounding left out of
this round's update joins the next one. So the sum of all decoded updates stays within one rounding of the sum of all
true ones. It holds where the factors that come back continue those that were sent; methods that choose the factors anew
in every round (`strategy.facts.Facts.coordinates`) carry nothing over, since a remainder of the old factors would be
multiplied with new ones. Tensors trained whole always carry it over.

An update that the server refuses is lost, whatever the format: the remainder does not bring it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType

import torch
from safetensors.torch import save
from torch import Tensor

from florana.aggregate.cores import folded
from florana.aggregate.heterogeneous import widen
from florana.errors import InputError
from florana.federation import quantize
from florana.federation.messages import Brief, completed, travelling
from florana.lora import linalg
from florana.lora.factors import Adapter, LoraFactors, kind_of

FEEDBACK = "feedback/"
"""What the names of remainders begin with among the things a client keeps: `feedback/A/<module>`, float32."""


@dataclass(frozen=True, eq=False)
class Outgoing:
    """A client's update on its way.

    Args:
        content: the safetensors bytes.
        arrives: the adapter that the server makes of them.
        feedback: what the client keeps for its next update, by names that begin with `feedback/`.
    """

    content: bytes
    arrives: Adapter
    feedback: Mapping[str, Tensor]


def outgoing(trained: Adapter, received: Adapter, brief: Brief, memory: Mapping[str, Tensor]) -> Outgoing:
    """The update that the brief asks for.

    Args:
        trained: what training made of it; without the tensors that stay with the client. Of a lower rank where pruned.
        received: what the client started from.
        brief: the server's request; it names the format and the kinds of tensors that carry feedback.
        memory: what it kept from earlier rounds; names that do not begin with `feedback/` do not matter here.

    Raises:
        InputError: a format that is not known here.
    """
    if brief.uplink not in quantize.FORMATS:
        raise InputError(
            f"the server asks for updates as '{brief.uplink}'",
            why=f"this florana writes {', '.join(quantize.FORMATS)}",
            fix="install the server's version of florana",
        )
    up = travelling(trained, brief.returns, brief.blocks)
    if brief.uplink == "float32":
        return Outgoing(_saved(up), trained, {})
    known = travelling(received, brief.returns, brief.blocks)
    before = {name: known[name][_corner(tensor)] for name, tensor in up.items()}
    carried = {name for name in up if kind_of(name) in brief.feedback}
    left = {name: _remainder(memory, name, trained) for name in carried}
    wanted = {n: t.double() + left[n][_blocks(n, brief)].double() if n in carried else t for n, t in up.items()}
    encoded = quantize.written(wanted, before, brief.uplink)
    there = quantize.read(encoded, before, brief.uplink)
    feedback = {name: tensor for name, tensor in memory.items() if name.startswith(FEEDBACK)}
    for name in sorted(carried):
        rest = (wanted[name] - there[name].double()).float()
        # what could not be sent at all (a value that is not finite) must not spoil the rounds to come
        left[name][_blocks(name, brief)] = rest.nan_to_num(0.0, 0.0, 0.0)
        feedback[FEEDBACK + name] = left[name]
    return Outgoing(_saved(encoded), completed(trained, there, brief.blocks), feedback)


def packed_size(tensors: Mapping[str, Tensor], form: quantize.Format) -> int:
    """Bytes of a message of such tensors in that format, whatever their values."""
    return len(_saved(quantize.written(tensors, tensors, form)))


def uplink_error(arrives: Adapter, trained: Adapter, received: Adapter) -> float:
    """How far the update that the server holds is from the client's own, in products, relative to the update:

        || s B' A' - s B A ||_F  /  || s B A - s B_0 A_0 ||_F

    over all modules together (root of summed squares), with (B, A) as trained, (B', A') as it arrives and (B_0, A_0)
    as received; cores are multiplied into B, tensors trained whole do not count. With error feedback, what an earlier
    round left out counts too, in the round that brings it. 0 where training changed nothing.

    Everything stays factored: B' A' - B A = (B' - B) A' + B (A' - A), which does not cancel.

    Examples:
        >>> pair = LoraFactors(torch.ones(3, 1), torch.ones(1, 2), 2.0)
        >>> near = LoraFactors(torch.full((3, 1), 1.25), torch.ones(1, 2), 2.0)
        >>> zero = LoraFactors(torch.zeros(3, 1), torch.ones(1, 2), 2.0)
        >>> uplink_error(Adapter({"q": near}), Adapter({"q": pair}), Adapter({"q": zero}))
        0.25
    """
    there, own, before = (folded(adapter).modules for adapter in (arrives, trained, received))
    missed = [linalg.norm(_difference(there[name], own[name])) for name in own]
    moved = [linalg.norm(_difference(own[name], before[name])) for name in own]
    update = math.hypot(*moved)
    return math.hypot(*missed) / update if update > 0 else 0.0


def _difference(first: LoraFactors, second: LoraFactors) -> linalg.Stack:
    """s (B' A' - B A) of two pairs of one scaling; the lower rank, of a pruned client, is padded with zeros."""
    rank = max(first.rank, second.rank)
    (B1, A1), (B, A) = ((widen(p.B.double(), rank, 1), widen(p.A.double(), rank, 0)) for p in (first, second))
    return linalg.Stack(torch.cat([B1 - B, B], dim=1) * second.scaling, torch.cat([A1, A1 - A], dim=0))


def _remainder(memory: Mapping[str, Tensor], name: str, trained: Adapter) -> Tensor:
    """A copy of what is left of the tensor, whole (all blocks of a core), zeros where nothing is.

    A client that has pruned its rank since drops what lies beyond; where its pruning was refused, zeros stand there.
    """
    whole = torch.zeros_like(trained.tensors()[name], dtype=torch.float32)
    old = memory.get(FEEDBACK + name)
    if old is not None:
        whole[_corner(old)] = old[_corner(whole)]
    return whole


def _corner(tensor: Tensor) -> tuple[slice, ...]:
    """The first rows, columns, ... of another tensor, as many as this one has."""
    return tuple(slice(size) for size in tensor.shape)


def _blocks(name: str, brief: Brief) -> list[int] | EllipsisType:
    """Which part of the whole tensor travels."""
    return sorted(brief.blocks) if brief.blocks is not None and kind_of(name) == "core" else ...


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})
