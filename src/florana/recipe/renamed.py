"""Keys of a recipe that have a new name: the old one is understood for one version, and says what to write."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from florana.errors import RecipeError

RENAMED = {
    "strategy.gauge": "factorization",
    "strategy.memory": "carry_rank",
    "study.swap_rounds": "fixed_updates_rounds",
}
"""Section and old key -> the key's new name, since version 0.2."""


def current(section: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """A section's table with the present names of its keys; warns (FutureWarning) of each old one.

    Args:
        section: its name in the recipe.
        table: its keys and values.

    Raises:
        RecipeError: a key is given by its old and by its new name.

    Examples:
        >>> with warnings.catch_warnings(record=True):
        ...     warnings.simplefilter("always")
        ...     current("strategy", {"name": "best-rank", "memory": 8})
        {'name': 'best-rank', 'carry_rank': 8}
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        new = RENAMED.get(f"{section}.{key}")
        if new is not None and new in table:
            raise RecipeError(f"'{section}.{key}' and '{section}.{new}' are one key", fix=f"leave {section}.{key} out")
        if new is not None:
            text = f"'{section}.{key}' is now called '{section}.{new}'; the old name ends with version 0.3"
            warnings.warn(text, FutureWarning, stacklevel=3)
        found[new or key] = value
    return found
