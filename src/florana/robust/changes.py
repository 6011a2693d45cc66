"""How far clients moved the model, and how alike their moves are: inner products of changes, never dense.

A client's change of a module is that of its product, from what it was sent (B_0, A_0) to what it answers (B_u, A_u):

    D_u = s (B_u A_u - B_0 A_0) = s [B_u - B_0, B_0] [A_u; A_u - A_0] = L_u R_u        L_u (out, 2r), R_u (2r, in)
    <D_u, D_v> = <L_u^T L_v, R_u R_v^T>                                               blocks of 2r x 2r, float64

The middle form has no difference of large products, so small changes keep their digits. Cores are multiplied into B; a
factor that did not move drops its half. Where all clients were sent the same (B_0, A_0), the same sums are taken apart
so that B_0 and A_0 are multiplied once (`_from_one_start`): a quarter of the work. A frozen part beside the LoRA
factors is the same before and after, and cancels.

A product is all that a model sees, but not all that a rule sees: (B t, A / t) is the product of (B, A), and averaged
entry by entry with others' factors it ruins them. So the factors' own changes are measured beside the product, and the
tensors trained whole (heads) by themselves, since they are of another size:

    product    sum over modules of <D_u, D_v>
    A, B       sum over modules of <A_u - A_0, A_v - A_0>, and the same of B; where the factor travels
    extra      sum over heads of <h_u - h_0, h_v - h_0>
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from florana.aggregate.cores import fold
from florana.lora.factors import Adapter, LoraFactors, kind_of
from florana.lora.linalg import Stack

CLIENTS_AT_ONCE = 16
"""Of whom inner products with all others are taken in one matrix product: many for speed, few for memory."""

Pair = tuple[Adapter, Adapter]
"""What a client answers, and what it was sent. The answer may be of a lower rank: it then continues the first columns
of B and rows of A."""


def sizes(pair: Pair, travels: Collection[str]) -> dict[str, float]:
    """The norms of one client's change: of `product`, of `A` and `B` where they are in `travels`, of `extra`.

    Examples:
        >>> before = Adapter({"q": LoraFactors(torch.zeros(3, 1), torch.ones(1, 4), 2.0)})
        >>> after = Adapter({"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 4), 2.0)})
        >>> found = sizes((after, before), {"A", "B"})
        >>> {name: round(size, 4) for name, size in found.items()}  # 2 sqrt(12), 0, sqrt(3)
        {'product': 6.9282, 'A': 0.0, 'B': 1.7321}
    """
    return {name: math.sqrt(max(float(gram[0, 0]), 0.0)) for name, gram in grams([pair], travels).items()}


def grams(pairs: Sequence[Pair], travels: Collection[str]) -> dict[str, Tensor]:
    """The inner products of all clients' changes, (U, U) float64 each, by what changed.

    Args:
        pairs: one per client; the same modules, any ranks.
        travels: the kinds of tensors that clients send.
    """
    found: dict[str, Tensor] = {}
    first = pairs[0][1]
    for module in first.modules:
        own = (
            _from_one_start([after.modules[module] for after, _ in pairs], first.modules[module])
            if _started_alike(pairs, module)
            else _products([change(*pair, module) for pair in pairs])
        )
        found["product"] = found.get("product", 0) + own
    named = [(after.tensors(), before.tensors()) for after, before in pairs]
    for name in first.tensors():
        kind = kind_of(name)
        if kind == "extra" or (kind in ("A", "B") and kind in travels):
            found[kind] = found.get(kind, 0) + _plain([_difference(new[name], old[name]) for new, old in named])
    return found


def distance_gram(found: Mapping[str, Tensor]) -> Tensor:
    """One matrix of inner products of all that changed, each kind in units of its median client's change:

        K = sum over kinds of K_kind / median_u K_kind[u, u]

    so that neither the head nor a factor drowns the rest, and fewer than half of the clients cannot choose the units.
    A kind that the median client did not change says nothing and is left out.
    """
    total = torch.zeros_like(next(iter(found.values())))
    for gram in found.values():
        unit = statistics.median_low(gram.diagonal().tolist())
        if unit > 0:
            total += gram / unit
    return total


def change(after: Adapter, before: Adapter, module: str) -> Stack:
    """[B_u - B_0, B_0] [A_u; A_u - A_0], the scaling in the left factor; only the halves that moved."""
    new, old = after.modules[module], start(before.modules[module], after.modules[module].rank)
    if module in after.cores:
        moved = fold(_wide(old), after.cores[module].double() - before.cores[module].double())
        return Stack(moved.B * moved.scaling, moved.A)
    dB, dA = new.B.double() - old.B.double(), new.A.double() - old.A.double()
    left, right = [], []
    if bool(dB.any()):
        left, right = [dB * new.scaling], [new.A.double()]
    if bool(dA.any()) and bool(old.B.any()):
        left, right = [*left, old.B.double() * new.scaling], [*right, dA]
    if not left:
        return Stack(dB[:, :1], dA[:1])  # zeros
    return Stack(torch.cat(left, dim=1), torch.cat(right, dim=0))


def _products(changes: Sequence[Stack]) -> Tensor:
    """<D_u, D_v> of one module: sums over blocks of (L^T L) * (R R^T), a row of them at a time from the diagonal on."""
    left, right = torch.cat([c.left for c in changes], dim=1), torch.cat([c.right for c in changes], dim=0)
    owner = torch.cat([torch.full((c.left.shape[1],), u) for u, c in enumerate(changes)])
    result = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    begin = 0
    for u, own in enumerate(changes):
        columns = ((own.left.T @ left[:, begin:]) * (own.right @ right[begin:].T)).sum(dim=0)
        result[u].index_add_(0, owner[begin:], columns)
        begin += own.left.shape[1]
    return result + result.triu(1).T


def _started_alike(pairs: Sequence[Pair], module: str) -> bool:
    """Whether all clients were sent the same factors of a module and answer with as many columns, without cores."""
    old = pairs[0][1].modules[module]
    return all(
        module not in after.cores
        and after.modules[module].B.shape == old.B.shape
        and torch.equal(before.modules[module].B, old.B)
        and torch.equal(before.modules[module].A, old.A)
        for after, before in pairs
    )


def _from_one_start(after: Sequence[LoraFactors], old: LoraFactors) -> Tensor:
    """<D_u, D_v> of one module whose factors all began at the same (B, A).

    With b_u = B_u - B, a_u = A_u - A, D_u = s (b_u A_u + B a_u) and * entry by entry, a sum over r x r entries:

        <D_u, D_v> = s_u s_v sum  b_u'b_v * (A A' + a_u A' + A a_v' + a_u a_v')  +  a_u a_v' * (b_u'B + B'b_v + B'B)
                                  +  b_u'B * A a_v'  +  B'b_v * a_u A'
    """
    count, rank = len(after), old.rank
    B, A = old.B.double().T, old.A.double()
    b = torch.cat([pair.B.double().T - B for pair in after])  # (U r, out): a column of a client's B is a row
    a = torch.cat([pair.A.double() - A for pair in after])  # (U r, in)
    bB, aA = (b @ B.T).view(count, rank, rank), (a @ A.T).view(count, rank, rank)
    result = torch.zeros(count, count, dtype=torch.float64)
    for u in range(0, count, CLIENTS_AT_ONCE):
        rows, rest = slice(u * rank, (u + CLIENTS_AT_ONCE) * rank), slice(u * rank, None)
        bb = (b[rows] @ b[rest].T).view(-1, rank, count - u, rank)
        aa = (a[rows] @ a[rest].T).view(-1, rank, count - u, rank)
        some = slice(u, u + CLIENTS_AT_ONCE)
        bB_u, aA_u = bB[some].unsqueeze(2), aA[some].unsqueeze(2)  # entry (u, i, any v, j)
        Bb_v, Aa_v = bB[u:].permute(2, 0, 1), aA[u:].permute(2, 0, 1)  # entry (any u, i, v, j)
        sums = bb * ((A @ A.T).unsqueeze(1) + aA_u + Aa_v + aa) + aa * (bB_u + Bb_v + (B @ B.T).unsqueeze(1))
        result[some, u:] = (sums + bB_u * Aa_v + Bb_v * aA_u).sum(dim=(1, 3))
    scaling = torch.tensor([pair.scaling for pair in after], dtype=torch.float64)
    return (result.triu() + result.triu(1).T) * scaling.outer(scaling)


def _plain(differences: Sequence[Tensor]) -> Tensor:
    flat = torch.stack([difference.flatten() for difference in differences])
    return flat @ flat.T


def _difference(new: Tensor, old: Tensor) -> Tensor:
    """A tensor's change, float64, zeros where a lower rank has left something out."""
    moved = torch.zeros(old.shape, dtype=torch.float64)
    corner = tuple(slice(size) for size in new.shape)
    moved[corner] = new.double() - old[corner].double()
    return moved


def start(pair: LoraFactors, rank: int) -> LoraFactors:
    """The first `rank` columns of B and rows of A."""
    return LoraFactors(pair.B[:, :rank], pair.A[:rank], pair.scaling)


def _wide(pair: LoraFactors) -> LoraFactors:
    return LoraFactors(pair.B.double(), pair.A.double(), pair.scaling)
