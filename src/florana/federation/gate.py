"""The gate: every reply is checked before any arithmetic sees it. One that fails is refused; the round goes on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from florana.aggregate.cores import folded
from florana.aggregate.heterogeneous import leading
from florana.federation import quantize
from florana.federation.messages import Reply, completed, travelling
from florana.federation.step_bounds import Reach
from florana.lora import linalg
from florana.lora.factors import Adapter, Update, kind_of
from florana.robust.changes import sizes
from florana.strategy.base import Payload

MAX_EXAMPLES = 1_000_000_000
"""More training examples than this from one client is taken for nonsense."""

MAX_CHANGE = 10.0
"""An update that moved the model more than this many times as far as the round's median update is refused."""


class RejectedUpdate(Exception):  # noqa: N818  (a verdict, not a fault)
    """Why a reply was not let through; the text is what the journal records."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What a proper reply of this round looks like.

    Args:
        round: the round that is running.
        clients: client name -> what it was sent; its reply must bring the tensors that come up, in these shapes and
            dtypes (or of the lower rank that was allowed, in all modules), and what does not come up stays as it was.
        examples: client name -> the number of its training rows, where the server knows it.
        uplink: the format of the replies, see `federation.quantize`.
        reach: training rows -> how far a round's training can have moved a number; None where clients train as they
            like.
    """

    round: int
    clients: Mapping[str, Payload]
    examples: Mapping[str, int] = field(default_factory=dict)
    uplink: quantize.Format = "float32"
    reach: Callable[[int], Reach | None] | None = None


Opened = Callable[[Payload], Mapping[str, Tensor]]
"""(what the client was sent) -> the tensors of its reply, named as `federation.quantize` has it. Raises
RejectedUpdate."""


def validate(reply: Reply, expected: Expected, seen: Collection[str], opened: Opened | None = None) -> Update:
    """The reply as an Update.

    Args:
        reply: what came from the client; untrusted.
        expected: what the server asked for.
        seen: the clients whose reply of this round was already let through.
        opened: how the tensors come out of the reply; the safetensors bytes of `reply.payload` where not given.

    Raises:
        RejectedUpdate: wrong round, unknown or repeated client, senseless number of examples, oversize or damaged
            bytes, a missing or foreign tensor, a wrong shape or dtype, a value or a product that is not finite, a scale
            below 0, a number that no training of this recipe could have moved so far.
    """
    check_head(reply, expected, seen)
    sent = expected.clients[reply.client]
    tensors = opened(sent) if opened else _from_bytes(reply.payload, sent, expected.uplink)
    adapter = _check_tensors(tensors, sent, expected.uplink)
    if expected.reach is not None and (reach := expected.reach(reply.examples)) is not None:
        _check_reach(adapter, sent, reach)
    return Update(reply.client, reply.round, adapter, reply.examples, dict(reply.metrics))


def check_head(reply: Reply, expected: Expected, seen: Collection[str]) -> None:
    """Raise RejectedUpdate where a reply is not one of this round, or what it says beside its tensors makes no sense.

    Args:
        reply: what came from the client; untrusted.
        expected: what the server asked for.
        seen: the clients whose reply was already let through.
    """
    if reply.client not in expected.clients:
        raise RejectedUpdate("was not asked in this round")
    if reply.round != expected.round:
        raise RejectedUpdate(f"answers round {reply.round}, but round {expected.round} is running")
    if reply.client in seen:
        raise RejectedUpdate("has already answered in this round")
    _check_examples(reply, expected.examples.get(reply.client))
    bad = [name for name, value in reply.metrics.items() if not math.isfinite(value)]
    if bad:
        raise RejectedUpdate(f"the metric '{bad[0]}' is not finite")


def _check_examples(reply: Reply, known: int | None) -> None:
    count: object = reply.examples
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_EXAMPLES:
        raise RejectedUpdate(
            f"reports {count!r} training examples; a whole number from 1 to {MAX_EXAMPLES} makes sense"
        )
    if known is not None and count != known:
        raise RejectedUpdate(f"reports {count} training examples, but has {known}")


def check_size(size: int, template: Mapping[str, Tensor]) -> None:
    """Raise RejectedUpdate where a reply is more than twice as large as its tensors are."""
    limit = 2 * sum(t.numel() * t.element_size() for t in template.values()) + 65_536
    if size > limit:
        raise RejectedUpdate(f"sent {size} bytes, the limit is {limit}")


def _from_bytes(content: bytes, sent: Payload, uplink: quantize.Format) -> Mapping[str, Tensor]:
    return loaded(content, quantize.form_of(travelling(sent.adapter, sent.work.up, sent.blocks), uplink))


def loaded(content: bytes, template: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a reply, their number and size bounded by those expected, and not otherwise checked.

    Raises:
        RejectedUpdate: too many bytes, or no safetensors.
    """
    check_size(len(content), template)
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RejectedUpdate(f"sent bytes that are not a safetensors file ({type(error).__name__})") from None


def _check_tensors(tensors: Mapping[str, Tensor], sent: Payload, uplink: quantize.Format) -> Adapter:
    _check_names(tensors, quantize.form_of(travelling(sent.adapter, sent.work.up, sent.blocks), uplink))
    like = _form(sent, tensors)
    values = checked(tensors, travelling(like, sent.work.up, sent.blocks), uplink)
    adapter = completed(like, values, sent.blocks)
    for name, pair in folded(adapter).modules.items():
        size = linalg.norm(linalg.stack([pair], [1.0]))
        if not size <= torch.finfo(torch.float32).max:
            raise RejectedUpdate(f"the product of module '{name}' overflows (norm {size:.1e})")
    return adapter


def checked(
    tensors: Mapping[str, Tensor], before: Mapping[str, Tensor], uplink: quantize.Format
) -> Mapping[str, Tensor]:
    """What a client's tensors say, in the place of `before`.

    Args:
        tensors: as they came.
        before: name -> what the server knows them to have been, or would be without any training.
        uplink: the format of the reply.

    Raises:
        RejectedUpdate: a missing or foreign name, a wrong shape or type, a value that is not finite, or too large.
    """
    template = quantize.form_of(before, uplink)
    _check_names(tensors, template)
    for name, expected in template.items():
        _check_tensor(name, tensors[name], expected)
        if uplink == "int8":
            _check_levels(name, tensors[name])
    values = quantize.read(tensors, before, uplink)
    if uplink != "float32":  # the sum of two numbers in range may be out of it
        for name, expected in before.items():
            _check_tensor(name, values[name], expected)
    return values


def _check_names(tensors: Mapping[str, Tensor], template: Mapping[str, Tensor]) -> None:
    for name in sorted(template.keys() - tensors.keys()):
        raise RejectedUpdate(f"lacks the tensor '{name}'")
    for name in sorted(tensors.keys() - template.keys()):
        raise RejectedUpdate(f"brings the foreign tensor '{name[:80]}'")


def _form(sent: Payload, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter whose shapes the reply must have: as it was sent, or of the one lower rank that was allowed.

    The first factor decides; all others are then held to the same rank.
    """
    if sent.pruning is None:
        return sent.adapter
    lower = leading(sent.adapter, sent.pruning.rank)
    first, wanted = min(item for item in travelling(lower, sent.work.up).items() if kind_of(item[0]) in ("A", "B"))
    return lower if tensors[first].shape == wanted.shape else sent.adapter


def _check_tensor(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise RejectedUpdate(f"tensor '{name}' has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
    if tensor.dtype != expected.dtype:
        raise RejectedUpdate(f"tensor '{name}' is {tensor.dtype}, expected {expected.dtype}")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise RejectedUpdate(f"tensor '{name}' has {bad} values that are not finite (NaN or infinite)")
    size = float(torch.linalg.vector_norm(tensor.double()))
    if not size <= torch.finfo(torch.float32).max:
        raise RejectedUpdate(f"tensor '{name}' overflows (norm {size:.1e})")


def _check_reach(adapter: Adapter, sent: Payload, reach: Reach) -> None:
    before, after = sent.adapter.tensors(), travelling(adapter, sent.work.up)
    for name, tensor in after.items():
        start = before[name][tuple(slice(size) for size in tensor.shape)]
        allowed = reach.of(name, start, sent.work.trains)
        beyond = ((tensor.double() - start.double()).abs() / allowed.clamp_min(1e-300)).max()
        if beyond > 1:
            raise RejectedUpdate(
                f"tensor '{name}' was changed {float(beyond):.1f} times as much as any training of this recipe can"
            )


def _check_levels(name: str, tensor: Tensor) -> None:
    """What the type of int8 and of its scales does not say."""
    if name.startswith(quantize.SCALE):
        if bool((tensor < 0).any()):
            raise RejectedUpdate(f"tensor '{name}' has a negative scale")
    elif bool((tensor < -quantize.LEVELS).any()):
        raise RejectedUpdate(f"tensor '{name}' has a level below -{quantize.LEVELS}")


def oversized(updates: Sequence[Update], sent: Mapping[str, Payload], factor: float) -> dict[str, str]:
    """Client -> why, for updates that moved the model more than `factor` times as far as the round's median update.

    What is measured is `robust.changes.sizes`: the change of the products, from what this client was sent, and beside
    it that of each factor that travels and of the heads, each against its own median. A product alone would not do:
    factors (B t, A / t) have an honest one, and ruin an average of factors.

    A finite number of any size can be honest; only beside the others' can it be told. So three updates are the fewest
    that say anything, and of an even number the lower median counts. What one or two updates may be at most, and what
    any number of them that lie together, is said by `reach`.

    Args:
        updates: the round's usable updates.
        sent: client -> what it was sent.
        factor: how many times the round's median change an update may have.
    """
    found = {u.client: sizes((u.adapter, sent[u.client].adapter), sent[u.client].work.up) for u in updates}
    return beyond(found, factor, _MEASURED)


def beyond(found: Mapping[str, Mapping[str, float]], factor: float, called: Mapping[str, str]) -> dict[str, str]:
    """Client -> why, of those that moved something more than `factor` times as far as the median, of three or more.

    Args:
        found: client -> kind -> how far it moved.
        factor: how many times the round's median change an update may have.
        called: kind -> what it is called; the kind itself where it has no other name.
    """
    wrong: dict[str, str] = {}
    for kind in next(iter(found.values())) if len(found) > 2 else ():
        median = statistics.median_low(moved[kind] for moved in found.values())
        wrong |= {
            client: f"changed {called.get(kind, kind)} by {moved[kind]:.1e}, more than {factor:g} times the median of "
            f"this round, {median:.1e}"
            for client, moved in found.items()
            if median > 0 and moved[kind] > factor * median and client not in wrong
        }
    return wrong


_MEASURED = {"product": "the products of its factors", "A": "its A", "B": "its B", "extra": "the tensors trained whole"}
