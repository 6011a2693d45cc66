"""One client's answer drawn back towards what it was sent, so far that it moved the model by a given share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from florana.lora.factors import Adapter, adapter_from_tensors
from florana.lora.linalg import Stack
from florana.robust.changes import Pair, change, start


def drawn_back(pair: Pair, share: Mapping[str, float]) -> Adapter:
    """The answer moved back towards what was sent, until its changes are at most that share of what they were.

    All tensors go back on the straight line by one t <= 1, so that they stay of one training:

        B_0 + t (B_u - B_0),  A_0 + t (A_u - A_0):        D(t) = t L + t^2 Q

    with L = s ((B_u - B_0) A_0 + B_0 (A_u - A_0)) and Q = s (B_u - B_0)(A_u - A_0). Heads and factors are linear in t.
    The largest t is taken at which the product's change, and all changes before it, are within their share: ||D(t)||^2
    is a quartic in t, whose root is found by bisection.

    Args:
        pair: see `Pair`.
        share: kind (as of `sizes`) -> at most 1.

    Examples:
        >>> from florana.lora.factors import LoraFactors
        >>> sent = Adapter({"q": LoraFactors(torch.zeros(1, 1), torch.ones(1, 1), 1.0)})
        >>> answer = Adapter({"q": LoraFactors(torch.ones(1, 1), torch.ones(1, 1), 1.0)})
        >>> back = drawn_back((answer, sent), {"product": 0.25})
        >>> float(back.modules["q"].B)
        0.25
    """
    after, before = pair
    linear = min([1.0, *(part for kind, part in share.items() if kind != "product")])
    t = min(linear, _line(pair, share.get("product", 1.0)))
    if t >= 1.0:
        return after
    known = before.tensors()
    moved = {n: _between(_like(known[n], tensor), tensor, t) for n, tensor in after.tensors().items()}
    return adapter_from_tensors(moved, after.scalings)


def _line(pair: Pair, share: float) -> float:
    """The largest t with ||D(t')|| <= share ||D(1)|| for all t' <= t."""
    if share >= 1.0:
        return 1.0
    LL = LQ = QQ = 0.0
    for name in pair[1].modules:
        one, other = _terms(*pair, name)
        LL, LQ, QQ = LL + _inner(one, one), LQ + _inner(one, other), QQ + _inner(other, other)

    def square(t: float) -> float:
        return t * t * (LL + t * (2 * LQ + t * QQ))

    limit = share * share * square(1.0)
    # ||D||^2 rises up to a first stationary point, if it has one in (0, 1): 2 LL + 6 LQ t + 4 QQ t^2 = 0.
    top, inside = 1.0, 9 * LQ * LQ - 8 * LL * QQ
    if QQ > 0 and LQ < 0 and inside > 0:
        first = (-3 * LQ - math.sqrt(inside)) / (4 * QQ)
        top = min(1.0, first) if square(min(1.0, first)) >= limit else 1.0
    low, high = 0.0, top
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if square(middle) <= limit else (low, middle)
    return low


def _terms(after: Adapter, before: Adapter, module: str) -> tuple[Stack, Stack]:
    """L and Q of `drawn_back`."""
    new, old = after.modules[module], start(before.modules[module], after.modules[module].rank)
    if module in after.cores:
        whole = change(after, before, module)
        return Stack(whole.left, whole.right), Stack(0 * whole.left, whole.right)
    dB, dA = (new.B.double() - old.B.double()) * new.scaling, new.A.double() - old.A.double()
    first = Stack(torch.cat([dB, old.B.double() * new.scaling], dim=1), torch.cat([old.A.double(), dA], dim=0))
    return first, Stack(dB, dA)


def _inner(one: Stack, other: Stack) -> float:
    return float(((one.left.T @ other.left) * (one.right @ other.right.T)).sum())


def _like(sent: Tensor, answer: Tensor) -> Tensor:
    """The part of what was sent that a client of a lower rank has answered with."""
    return sent[tuple(slice(size) for size in answer.shape)]


def _between(start: Tensor, end: Tensor, t: float) -> Tensor:
    return (start.double() + t * (end.double() - start.double())).to(end.dtype)
