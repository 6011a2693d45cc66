"""Aggregation stays on the device where the updates are: nothing of a rule is made anywhere else.

No GPU is needed to see it. With `meta` for the default device, a tensor that is made without naming a device has no
values, and the first use of it beside the updates fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from florana.aggregate.best_rank.project import best_rank, by_power, by_qr
from florana.aggregate.best_rank.truncate import by_energy, divided, everything
from florana.aggregate.error import measure
from florana.aggregate.flora_na import adamw, component
from florana.aggregate.flora_na.scalars import as_blocks, as_factors, mix, per_model, per_model_relative
from florana.aggregate.mean import mean
from florana.aggregate.remainder import mean_and_remainder
from florana.aggregate.stack import stack
from florana.lora.factors import Contribution
from tests.cases import make_case

RULES: dict[str, Callable[[Sequence[Contribution]], Any]] = {
    "mean": mean,
    "best-rank, qr": lambda parts: best_rank(parts, 3, way=by_qr),
    "best-rank, power": lambda parts: best_rank(parts, 3, way=by_power),
    "stack": stack,
    "mix": mix,
    "mix, blocks": lambda parts: mix(parts, way=as_blocks),
    "mix, factors": lambda parts: mix(parts, way=as_factors),
    "mix, one for all": lambda parts: mix(parts, fit=per_model),
    "mix, relative": lambda parts: mix(parts, fit=per_model_relative),
    "mix, updates": lambda parts: mix(parts, base=parts[0].adapter),
    "mix, adamw": lambda parts: mix(parts, solver=adamw.solve),
    "mix, components": lambda parts: mix(parts, solver=component.solve),
    "oracle": lambda parts: divided(parts, 3, everything),
    "florist": lambda parts: divided(parts, 3, by_energy(0.9)),
    "fedex": mean_and_remainder,
    "measure": lambda parts: measure(parts, parts[0].adapter),
}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_makes_nothing_on_another_device(name: str, request: pytest.FixtureRequest) -> None:
    parts = make_case(3, 4, 3, [(24, 10), (8, 30)], dtype=torch.float32, equal_scalings=True).parts
    request.getfixturevalue("elsewhere")
    assert RULES[name](parts) is not None
