from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.chaos.counts import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Notes a line of the table that the run ends with."""

    def note(what: str, count: int, result: str) -> None:
        request.node.user_properties.append(("chaos", (what, count, result)))

    return note


@pytest.fixture
def table(recipe_table: dict[str, Any]) -> dict[str, Any]:
    table = copy.deepcopy(recipe_table)
    table["partition"] = {"kind": "iid", "clients": 3}
    table["federation"] = {"rounds": 3, "min_clients": 1}
    table["train"] = {"steps": 1, "batch_size": 4, "learning_rate": 0.01}
    table["evaluate"] = {"personal": "never"}
    table["strategy"] = {"name": "fedsa-lora"}
    return table
