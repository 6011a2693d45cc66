"""The sums of a method that averages what is sent entry by entry: one trip, of the very tensors that would travel."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from florana.federation.messages import completed, travelling
from florana.lora.factors import Adapter
from florana.strategy.base import Allowed, Named, Sums


def entrywise(kinds: Collection[str]) -> Sums:
    """One sum: of the tensors of these kinds, and of those trained whole.

    Args:
        kinds: of `A`, `B`, `core` and `scale`, that go up in this round.

    Examples:
        >>> import torch
        >>> from florana.lora.factors import LoraFactors
        >>> sent = Adapter({"q": LoraFactors(torch.zeros(3, 1), torch.ones(1, 2), 1.0)})
        >>> sorted(entrywise(["B"]).measure(0, 1, {}, sent, sent))
        ['B/q']
    """

    def ask(sent: Adapter, means: Sequence[Named]) -> Named:
        del sent, means
        return {}

    def measure(trip: int, round_: int, question: Named, received: Adapter, trained: Adapter) -> Named:
        del trip, round_, question, received
        return travelling(trained, kinds)

    def mean(sent: Adapter, means: Sequence[Named]) -> Adapter:
        return completed(sent, means[0])

    def bounds(trip: int, round_: int, question: Named, received: Adapter, allowed: Allowed) -> dict[str, float]:
        del trip, round_, question
        return {name: float(allowed(name).max()) for name in travelling(received, kinds)}

    return Sums(1, ask, measure, mean, bounds)
