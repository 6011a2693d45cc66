"""A recipe as Flower's run configuration (flat scalars), and back; and the few keys that are the deployment's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from florana.bounded import json_of
from florana.errors import RecipeError, nearest
from florana.recipe.load import check
from florana.recipe.schema import Recipe

Scalar = str | int | float | bool
_JSON = "json:"
_OWN = "run."
_SECTIONS = ("model", "data", "partition", "train", "federation", "strategy", "evaluate")


@dataclass(frozen=True)
class Settings:
    """What a run over Flower needs beside the recipe.

    Args:
        out: the run folder, on the server.
        resume: whether to continue the run in that folder.
        roster: a file with the approved clients and their keys; empty in a simulation.
        deadline: seconds from the start of a round to the last answer that counts.
        wait: seconds to wait for clients before the first round.
        base: whether the server loads the base model (and measures the global model on the common test set).
        kept: the folder where clients of a simulation keep their client state; empty: below `out`.
    """

    out: str = "florana-run"
    resume: bool = False
    roster: str = ""
    deadline: float = 3600.0
    wait: float = 600.0
    base: bool = True
    kept: str = ""


def to_config(recipe: Recipe, settings: Settings) -> dict[str, Scalar]:
    """Every key of a recipe as `section.key`, lists, tables and nulls as JSON; the settings as `run.<name>`.

    All keys are there, since Flower lets nobody set one that the app did not declare.
    """
    table = recipe.model_dump(mode="json")
    flat: dict[str, Any] = {key: table[key] for key in ("title", "seed", "threads", "task")}
    for section in _SECTIONS:
        flat |= {f"{section}.{key}": value for key, value in table[section].items()}
    if recipe.generation is not None:
        flat |= {f"generation.{key}": value for key, value in table["generation"].items()}
    config = {k: _JSON + json.dumps(v) if v is None or isinstance(v, list | dict) else v for k, v in flat.items()}
    return config | {_OWN + name: value for name, value in asdict(settings).items()}


def from_config(config: Mapping[str, Scalar]) -> tuple[Recipe, Settings]:
    """The inverse. Raises RecipeError with every fault, as for a recipe file."""
    table: dict[str, Any] = {}  # section -> key -> value
    own: dict[str, Any] = {}
    known = asdict(Settings())
    given: dict[str, Any] = dict(config)
    for key, value in given.items():
        if key.startswith(_OWN):
            name = key.removeprefix(_OWN)
            if name not in known:
                raise RecipeError(f"there is no setting '{key}'", fix=nearest(name, known))
            own[name] = _typed(key, value, type(known[name]))
            continue
        if isinstance(value, str) and value.startswith(_JSON):
            value = json_of(value.removeprefix(_JSON))
        if value is None:
            continue
        section, dot, name = key.partition(".")
        if dot:
            table.setdefault(section, {})[name] = value
        else:
            table[section] = value
    return check(table, "the run configuration"), Settings(**own)


def _typed(key: str, value: Scalar, kind: type) -> Scalar:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise RecipeError(f"{key} is {value!r}, not {'a number' if kind is float else f'of type {kind.__name__}'}")
    return value
