"""Small matrices trained between fixed factors: their mean is exact.

    update_u = s B blockdiag(C_u1, ..., C_uh) A        C_k = sum_u w_u C_uk        (B, A the same for all clients)

The target is linear in the cores, so averaging them is averaging the updates: Fed-SB (arXiv 2502.15436) with one
block, RAVAN (arXiv 2506.05568) with h of them. Where clients train some of the blocks, each block is averaged over
those who trained it, T_k, and one that nobody trained stays as it was:

    C_k = sum_{u in T_k} w_u C_uk / sum_{u in T_k} w_u
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.aggregate import validate
from florana.errors import InputError
from florana.lora.factors import Adapter, Contribution, LoraFactors


def fold(pair: LoraFactors, core: Tensor) -> LoraFactors:
    """The plain LoRA factors with the same update: B blockdiag(core) in the place of B.

    Examples:
        >>> pair = LoraFactors(torch.ones(3, 2), torch.ones(2, 4), 0.5)
        >>> fold(pair, torch.tensor([[[2.0]], [[3.0]]])).B[0]
        tensor([2., 3.])
    """
    count, size, _ = core.shape
    inner = pair.B.reshape(len(pair.B), count, size)  # (out, h, k)
    B = torch.einsum("ohj,hjk->ohk", inner, core.to(pair.B.dtype)).reshape(pair.B.shape)
    return LoraFactors(B=B, A=pair.A, scaling=pair.scaling)


def folded(adapter: Adapter) -> Adapter:
    """The adapter with every core multiplied into its B: plain LoRA, as rules and PEFT know it."""
    if not adapter.cores:
        return adapter
    modules = {
        name: fold(pair, adapter.cores[name]) if name in adapter.cores else pair
        for name, pair in adapter.modules.items()
    }
    return Adapter(modules, adapter.extra)


def mean_cores(parts: Sequence[Contribution]) -> Adapter:
    """The clients' common fixed factors with the weighted mean of their cores; extra tensors are averaged.

    Args:
        parts: one contribution per client; `Contribution.blocks` says which blocks it trained.

    Raises:
        InputError: a client has other fixed factors than the first, cores of another shape, or another state of a block
            that neither of them trained.

    Examples:
        >>> pair = {"q": LoraFactors(torch.ones(3, 1), torch.ones(1, 4), 1.0)}
        >>> x, y = (Adapter(pair, cores={"q": torch.full((1, 1, 1), value)}) for value in (1.0, 5.0))
        >>> mean_cores([Contribution("x", x, 3), Contribution("y", y, 1)]).cores["q"].item()
        2.0
    """
    validate.shares(parts)  # nothing to aggregate, or senseless weights, are said first
    first = parts[0]
    validate.columns([Contribution(p.client, Adapter(p.adapter.modules, p.adapter.extra), p.weight) for p in parts])
    for part in parts:
        for name, pair in first.adapter.modules.items():
            own = part.adapter.modules[name]
            if not (torch.equal(own.A, pair.A) and torch.equal(own.B, pair.B) and own.scaling == pair.scaling):
                raise InputError(
                    f"module '{name}': the fixed factors of client '{part.client}' are not those of '{first.client}'",
                    why="cores can only be summed between the same factors",
                )
        if part.adapter.cores.keys() != first.adapter.cores.keys():
            raise InputError(f"client '{part.client}' has cores for other modules than client '{first.client}'")
    cores = {name: _mean_core(parts, name) for name in first.adapter.cores}
    modules = {n: LoraFactors(p.B.clone(), p.A.clone(), p.scaling) for n, p in first.adapter.modules.items()}
    return Adapter(modules, validate.average_extra(parts), cores)


def _mean_core(parts: Sequence[Contribution], module: str) -> Tensor:
    """One module's core (h, k, k), block by block."""
    wanted = parts[0].adapter.cores[module].shape
    for part in parts:
        shape = part.adapter.cores[module].shape
        if shape != wanted:
            raise InputError(
                f"the core of module '{module}' is {tuple(shape)} in client '{part.client}' but {tuple(wanted)} in "
                f"client '{parts[0].client}'"
            )
        validate.require_finite(part.adapter.cores[module], f"client '{part.client}', the core of module '{module}'")
    return torch.stack([_mean_block(parts, module, k) for k in range(wanted[0])])


def _mean_block(parts: Sequence[Contribution], module: str, k: int) -> Tensor:
    """One block (k, k): the mean over those who trained it; where none of them counts, as it was sent."""
    trained = [part for part in parts if part.blocks is None or k in part.blocks]
    frozen = [part for part in parts if part.blocks is not None and k not in part.blocks]
    for part in frozen[1:]:
        if not torch.equal(part.adapter.cores[module][k], frozen[0].adapter.cores[module][k]):
            raise InputError(
                f"block {k} of module '{module}' is another one in client '{part.client}' than in '{frozen[0].client}'",
                why="neither of them trained it",
            )
    if not any(part.weight > 0 for part in trained):
        return frozen[0].adapter.cores[module][k].clone()
    own = [{module: part.adapter.cores[module][k]} for part in trained]
    return validate.average(trained, own, f"block {k} of module")[module]
