"""What several test files of this subject share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from florana.federation.messages import completed, travelling
from florana.lora.factors import Adapter, Contribution, LoraFactors, kind_of
from florana.strategy.base import State, Strategy
from tests.cases import dense, make_case

RANKS = {"c0": 1, "c1": 2, "c2": 4}


def scaling_of(rank: int) -> float:
    return 6.0 / rank


def trained(strategy: Strategy, state: State, seed: int, ranks: Mapping[str, int] | None = None) -> list[Contribution]:
    """Three clients that move what they are asked to train; unequal weights; as the loop would hand them on."""
    rng = np.random.default_rng(seed)
    parts = []
    for client, weight in (("c0", 3.0), ("c1", 1.0), ("c2", 2.5)):
        payload = strategy.brief(state, client)
        tensors = {
            name: tensor + torch.from_numpy(rng.normal(size=tuple(tensor.shape))).to(tensor.dtype)
            if kind_of(name) in payload.work.trains & payload.work.up
            else tensor
            for name, tensor in payload.adapter.tensors().items()
        }
        whole = _adapter(tensors, payload.adapter)
        adapter = completed(payload.adapter, travelling(whole, payload.work.up, payload.blocks), payload.blocks)
        parts.append(Contribution(client, adapter, weight, payload.residual, payload.blocks))
    return parts


def _adapter(tensors: Mapping[str, torch.Tensor], like: Adapter) -> Adapter:
    modules = {n: LoraFactors(tensors[f"B/{n}"], tensors[f"A/{n}"], p.scaling) for n, p in like.modules.items()}
    return Adapter(modules, like.extra, {n: tensors[f"core/{n}"] for n in like.cores})


def start_of(seed: int = 0, rank: int = 4) -> Adapter:
    case = make_case(seed, 1, rank, [(9, 13), (14, 6)])
    scaled = {n: LoraFactors(p.B, p.A, scaling_of(rank)) for n, p in case.parts[0].adapter.modules.items()}
    return Adapter(scaled, case.parts[0].adapter.extra)


def model_of(adapter: Adapter, residual: Adapter | None, module: str) -> np.ndarray:
    """What is added to the base weight, dense, float64, written out."""
    pair = adapter.modules[module]
    middle = np.eye(pair.rank)
    if module in adapter.cores:
        core = adapter.cores[module].double().numpy()
        size = core.shape[1]
        middle = np.zeros((pair.rank, pair.rank))
        for k, block in enumerate(core):
            middle[k * size : (k + 1) * size, k * size : (k + 1) * size] = block
    total = pair.scaling * pair.B.double().numpy() @ middle @ pair.A.double().numpy()
    if residual is not None and module in residual.modules:
        total = total + dense(residual, module)
    return total


def truth_of(parts: Sequence[Contribution], module: str) -> np.ndarray:
    """The weighted mean of the clients' whole models."""
    total = sum(part.weight for part in parts)
    return sum(part.weight / total * model_of(part.adapter, part.residual, module) for part in parts)
