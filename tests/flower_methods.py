"""florana's Flower strategies over the fake grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("flwr", reason="the extra florana[flower] is not installed")

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

import florana.flower
from florana.flower import LoraStrategy
from tests.flower_fake import (
    SCALING,
    FakeGrid,
    initial,
)

METHODS = {name: getattr(florana.flower, name) for name in florana.flower.__all__ if name[0].isupper()}
del METHODS["LoraStrategy"]
PLAIN = ["FedIT", "FloraNA", "BestRank", "FlexLora", "HetLora", "LoraFair", "FedRot"]
Answer = Callable[[Message], list[Message]]


def made(name: str, **options: object) -> LoraStrategy:
    strategy = METHODS[name](scaling=SCALING, min_train_nodes=4, min_evaluate_nodes=0, fraction_evaluate=0.0, **options)
    assert isinstance(strategy, Strategy)
    return strategy


def rounds(strategy: LoraStrategy, answer: Answer, count: int = 1, backwards: bool = False) -> FakeGrid:
    """Flower's own loop over a fake grid."""
    grid = FakeGrid(answer, backwards=backwards)
    strategy.start(grid, initial(), num_rounds=count)
    return grid


def bytes_of(strategy: LoraStrategy) -> dict[str, bytes]:
    """Everything the method knows, bit by bit."""
    state = strategy.state
    assert state is not None
    tensors = {f"adapter/{n}": t for n, t in state.adapter.tensors().items()} | dict(state.memory)
    if state.residual is not None:
        tensors |= {f"residual/{n}": t for n, t in state.residual.tensors().items()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
