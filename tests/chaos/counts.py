"""How often, and what a test notes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ADAPTER = "adapter/adapter_model.safetensors"
Tally = Callable[[str, int, str], None]


def often(few: int, many: int) -> Any:
    """A few in every test run, many by `make chaos`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.chaos)])


def digest(out: Path) -> str:
    return hashlib.sha256((out / ADAPTER).read_bytes()).hexdigest()
