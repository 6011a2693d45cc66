"""How an adapter is used: what its folder says beside PEFT's own configuration, in `florana.json`.

    ADAPTER/florana.json    task, classes by name, columns, template, length

Untrusted where a folder came from elsewhere: every key has one type, and an unknown one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field

from florana.adapters.beside import USAGE
from florana.atomic_files import replace_file
from florana.bounded import read_json
from florana.errors import InputError
from florana.recipe.data_schema import Section
from florana.recipe.schema import Recipe
from florana.score.glue import GlueName


class Usage(Section):
    """What one must know to ask the model as it was trained."""

    task: Literal["sequence-classification", "sequence-regression", "causal-lm"]
    labels: list[str] = Field([])
    """The classes, in the order of the model's outputs."""
    text: str | list[str] = "text"
    label: str | None = None
    glue: GlueName | None = None
    instructions: Literal["alpaca", "dolly", "prompt-response", "messages", "sharegpt"] | None = None
    template: Literal["plain", "chat"] = "plain"
    max_length: int = Field(512, ge=4)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def usage_of(recipe: Recipe, labels: Sequence[str]) -> Usage:
    """How the adapter of a run is used.

    Args:
        recipe: the run's.
        labels: the classes' names; those of a regression's bins do not count.
    """
    data = recipe.data
    return Usage(
        task=recipe.task,
        labels=list(labels) if recipe.task == "sequence-classification" else [],
        text=data.text,
        label=data.label,
        glue=data.glue,
        instructions=data.instructions,
        template=data.template,
        max_length=data.max_length,
        dtype=recipe.model.dtype,
    )


def write_usage(folder: Path, usage: Usage) -> None:
    """Write it beside the adapter; the same usage gives the same bytes."""
    replace_file(folder / USAGE, (json.dumps(usage.model_dump(exclude_none=True), indent=1) + "\n").encode())


def read_usage(folder: Path) -> Usage | None:
    """What the folder says; None where it says nothing.

    Raises:
        InputError: the file cannot be read, or is not what `write_usage` writes.
    """
    path = folder / USAGE
    if not path.exists():
        return None
    try:
        return Usage.model_validate(read_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} is not what florana writes", why=f"{where}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", why=str(error)) from None
