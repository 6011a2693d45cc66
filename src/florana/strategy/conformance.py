"""What every rule must hold, tried on a small made-up federation before anybody trusts its figures.

The same invariants as the contract table of florana's own tests: one client comes out as it went in, the order of
clients and the scale of their weights do not matter, inputs stay as they were, names, shapes, rank and dtype are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy.custom import Rule

RANK, TOLERANCE = 2, 1e-4


def check_rule(rule: Rule, name: str) -> None:
    """Raise RecipeError naming every invariant that the rule breaks, or the error it raises.

    Examples:
        >>> from florana.aggregate.mean import mean
        >>> check_rule(lambda parts, rank: mean(parts), "mean")
    """
    parts = _parts()
    try:
        faults = _faults(rule, parts)
    except Exception as error:  # anything at all: it is somebody else's function
        raise RecipeError(
            f"the method '{name}' fails on three small clients", why=f"{type(error).__name__}: {error}"
        ) from None
    if faults:
        raise RecipeError(
            f"the method '{name}' breaks the contract: " + "; ".join(faults),
            fix="a rule takes (contributions, rank) and gives an Adapter with the same modules, shapes, rank and dtype",
        )


def _faults(rule: Rule, parts: Sequence[Contribution]) -> list[str]:
    before = [{n: t.clone() for n, t in part.adapter.tensors().items()} for part in parts]
    answer: object = rule(parts, RANK)
    if not isinstance(answer, Adapter):
        return [f"it gives a {type(answer).__name__}, not an Adapter"]
    faults = _shape_faults(answer, parts[0].adapter)
    if faults:
        return faults
    if any(not torch.equal(t, old[n]) for part, old in zip(parts, before, strict=True)
           for n, t in part.adapter.tensors().items()):  # fmt: skip
        faults.append("it changes its inputs")
    if _far(rule(parts[:1], RANK), parts[0].adapter):
        faults.append("one client does not come out as it went in")
    if _far(rule([parts[2], parts[0], parts[1]], RANK), answer):
        faults.append("the order of clients matters")
    if _far(rule([replace(part, weight=4 * part.weight) for part in parts], RANK), answer):
        faults.append("the scale of the weights matters")
    if not _far(rule([replace(parts[0], weight=50.0), *parts[1:]], RANK), answer):
        faults.append("the weights are ignored")
    return faults


def _shape_faults(answer: Adapter, like: Adapter) -> list[str]:
    if answer.modules.keys() != like.modules.keys():
        return [f"it gives the modules {sorted(answer.modules)}, not {sorted(like.modules)}"]
    if answer.extra.keys() != like.extra.keys():
        return [f"it gives the extra tensors {sorted(answer.extra)}, not {sorted(like.extra)}"]
    faults = []
    for name, tensor in answer.tensors().items():
        wanted = like.tensors()[name]
        if tensor.shape != wanted.shape:
            faults.append(f"'{name}' is {tuple(tensor.shape)}, not {tuple(wanted.shape)}")
        elif tensor.dtype != wanted.dtype:
            faults.append(f"'{name}' is {tensor.dtype}, not {wanted.dtype}")
        elif not bool(torch.isfinite(tensor).all()):
            faults.append(f"'{name}' has values that are not finite")
    return faults


def _far(one: Adapter, other: Adapter) -> bool:
    return any(
        float((_product(pair) - _product(other.modules[name])).norm())
        > TOLERANCE * float(_product(other.modules[name]).norm())
        for name, pair in one.modules.items()
    )


def _product(pair: LoraFactors) -> Tensor:
    return pair.scaling * pair.B.double() @ pair.A.double()


def _parts() -> list[Contribution]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.0.q": (7, 12), "layer.1.v": (9, 5)}
    start = {n: (torch.randn(o, RANK, generator=generator), torch.randn(RANK, i, generator=generator))
             for n, (o, i) in shapes.items()}  # fmt: skip
    parts = []
    for client, weight in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        modules = {
            name: LoraFactors(
                B=B + 0.3 * torch.randn(B.shape, generator=generator),
                A=A + 0.3 * torch.randn(A.shape, generator=generator),
                scaling=1.5,
            )
            for name, (B, A) in start.items()
        }
        parts.append(Contribution(client, Adapter(modules, {"head": torch.randn(2, 3, generator=generator)}), weight))
    return parts
