"""Generated clients: non-square modules, unequal weights and scalings, several modules, as numpy and as florana's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from florana.lora.factors import Adapter, Contribution, LoraFactors
from tests.oracle import Client


@dataclass(frozen=True)
class Case:
    """The same clients twice: florana's contributions, and per module the oracle's clients."""

    parts: list[Contribution]
    modules: dict[str, list[Client]]
    rank: int


def make_case(
    seed: int,
    clients: int,
    rank: int,
    shapes: list[tuple[int, int]],
    *,
    drift: float = 0.5,
    equal_scalings: bool = False,
    mixed_ranks: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Case:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(clients)) * rng.uniform(0.5, 50)
    scalings = np.full(clients, 2.0) if equal_scalings else rng.choice([0.5, 1.0, 2.0, 16 / np.sqrt(8)], clients)
    ranks = [rank + (u % 3 if mixed_ranks else 0) for u in range(clients)]
    modules: dict[str, list[Client]] = {}
    for index, (out, into) in enumerate(shapes):
        B_0, A_0 = rng.normal(size=(out, max(ranks))), rng.normal(size=(max(ranks), into))
        modules[f"layer.{index}.q"] = [
            Client(
                B=(B_0 + drift * rng.normal(size=B_0.shape))[:, : ranks[u]],
                A=(A_0 + drift * rng.normal(size=A_0.shape))[: ranks[u]],
                scaling=float(scalings[u]),
                weight=float(weights[u]),
            )
            for u in range(clients)
        ]
    parts = [
        Contribution(
            f"c{u}",
            Adapter(
                {
                    name: LoraFactors(
                        B=torch.from_numpy(column[u].B).to(dtype),
                        A=torch.from_numpy(column[u].A).to(dtype),
                        scaling=column[u].scaling,
                    )
                    for name, column in modules.items()
                },
                {"head.weight": torch.full((2, 3), float(u), dtype=dtype)},
            ),
            float(weights[u]),
        )
        for u in range(clients)
    ]
    return Case(parts, modules, rank)


def cases(**fixed: object) -> st.SearchStrategy[Case]:
    """Cases of 1 to 6 clients, rank 1 to 4, one to three modules of different shapes."""
    return st.builds(
        lambda seed, clients, rank, shapes, drift: make_case(seed, clients, rank, shapes, drift=drift, **fixed),  # type: ignore[arg-type]
        seed=st.integers(0, 2**31),
        clients=st.integers(1, 6),
        rank=st.integers(1, 4),
        shapes=st.lists(st.sampled_from([(7, 12), (12, 7), (9, 9), (16, 5), (5, 30)]), min_size=1, max_size=3),
        drift=st.sampled_from([0.01, 0.3, 1.0, 3.0]),
    )


def dense(adapter: Adapter, module: str) -> np.ndarray:
    """scaling * B A of florana's adapter, in float64."""
    pair = adapter.modules[module]
    return pair.scaling * (pair.B.double() @ pair.A.double()).numpy()
