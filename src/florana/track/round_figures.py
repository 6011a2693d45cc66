"""What a tracker is told: a round's record as one flat table of numbers, a recipe as one flat table of settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from florana.displayable import displayable
from florana.federation.round_record import RoundRecord


def figures_of(record: RoundRecord) -> dict[str, float]:
    """A committed round's figures by name; what was not measured, and what is no finite number, is left out.

    Examples:
        >>> from florana.federation.round_record import RoundRecord
        >>> error = {"overall": 0.25, "optimum": None, "per_module": {}}
        >>> record = RoundRecord(1, "fedit", ["a"], {"b": "why"}, {}, {}, None, {"global": {"loss": 0.5}}, 8, 9, 1.0,
        ...                      2.0, error)
        >>> list(figures_of(record))[:3], figures_of(record)["clients/refused"]
        (['global/loss', 'error/overall', 'bytes/up'], 1)
    """
    found: dict[str, float | None] = {"train_loss": record.train_loss}
    for whose, scores in record.eval.items():
        found |= {f"{whose}/{name}": value for name, value in scores.items()}
    found |= {f"error/{name}": record.error.get(name) for name in ("overall", "optimum", "uplink")}
    found |= {
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "seconds/server": record.server_seconds,
        "seconds/clients": record.client_seconds,
        "clients/accepted": len(record.clients),
        "clients/refused": len(record.refused),
    }
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def settings_of(recipe: Mapping[str, Any], before: str = "") -> dict[str, str | int | float | bool]:
    """A recipe (as a table) by dotted keys; of an absolute path its last part, since the rest tells of a machine.

    Args:
        recipe: the table.
        before: the key of the table it stands in, with a dot.

    Examples:
        >>> settings_of({"seed": 3, "data": {"train": "/home/ada/rows.csv", "labels": ["a", "b"]}})
        {'seed': 3, 'data.train': 'rows.csv', 'data.labels': 'a, b'}
    """
    found: dict[str, str | int | float | bool] = {}
    for key, value in recipe.items():
        name = displayable(before + str(key), 200)
        if isinstance(value, Mapping):
            found |= settings_of(value, name + ".")
        elif isinstance(value, list | tuple):
            found[name] = displayable(", ".join(_told(str(one)) for one in value), 500)
        else:
            found[name] = value if isinstance(value, bool | int | float) else displayable(_told(str(value)), 500)
    return found


def _told(text: str) -> str:
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute() or text.startswith("~"):
            return kind(text).name
    return text
