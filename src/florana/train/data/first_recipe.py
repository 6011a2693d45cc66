"""A first recipe for a file of rows: what can be learnt from its columns, with a comment on each choice."""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import tomli_w

from florana.displayable import displayable
from florana.errors import InputError
from florana.train.data.instructions import CHATS, COLUMNS
from florana.train.data.tables import read_table

CLASSIFIER = "sentence-transformers/all-MiniLM-L6-v2"
WRITER = "HuggingFaceTB/SmolLM2-135M-Instruct"
LABELS = ("label", "labels", "class", "category", "target", "intent", "sentiment", "stars", "score", "rating", "y")
"""Names that columns of answers often have."""
MOST_CLASSES = 50
SEEN = 2000
"""Rows that are looked at."""


@dataclass(frozen=True)
class Guess:
    """What the columns look like.

    Args:
        task: as in a recipe.
        data: the keys of [data] beside `train`.
        why: a comment for the reader.
        length: letters of a typical text.
    """

    task: str
    data: dict[str, Any]
    why: str
    length: float


def first_recipe(file: Path, recipe: Path, encoding: str = "utf-8") -> str:
    """The text of a recipe, for a file of rows.

    Args:
        file: csv, tsv, jsonl, json or parquet.
        recipe: where the text will lie: paths in a recipe count from there.
        encoding: of a file of text.

    Raises:
        InputError: there is no such encoding, the file cannot be read, or no column holds text.
    """
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    except (LookupError, ValueError):
        raise InputError(
            f"there is no encoding '{encoding}'", fix="name one that Python knows: cp1252, latin-1"
        ) from None
    table = read_table(file.resolve(), f"all[:{SEEN}]", [], [], encoding)
    guess = guessed(table, file)
    place = os.path.relpath(file.resolve(), recipe.resolve().parent)
    tokens = min(512, max(32, 2 ** round(guess.length / 3).bit_length()))
    kind = "dirichlet" if guess.task == "sequence-classification" else "iid"
    other = {} if codecs.lookup(encoding).name == "utf-8" else {"encoding": encoding}
    data = tomli_w.dumps({"train": place, **other, **guess.data, "max_length": tokens}).strip()
    model = WRITER if guess.task == "causal-lm" else CLASSIFIER
    uneven = "alpha = 0.5\n" if kind == "dirichlet" else ""
    rate = "1e-3" if guess.task == "causal-lm" else "2e-3"
    return f"""# A first recipe for {displayable(file.name)}. What every key means: florana recipe --explain SECTION.KEY
#
#   florana run {displayable(recipe.name)} --dry-run        who gets what, bytes, memory, time; writes nothing
#   florana run {displayable(recipe.name)} --out runs/first

# {displayable(guess.why)}
task = "{guess.task}"

[model]
base = "{model}"    # any model that Transformers loads for this task: a hub name, a folder, a GGUF file
rank = 8
alpha = 16

[data]    # a fifth of the rows is set apart to measure on; give `test` where there is a file of its own
{data}

[partition]    # who holds what, in a simulation; small alpha: uneven
kind = "{kind}"
clients = 4
{uneven}
[train]
epochs = 1
batch_size = 16
learning_rate = {rate}

[federation]
rounds = 5

[strategy]
name = "best-rank"    # the nearest adapter of that rank; docs: which method?

# [server]
# optimizer = "momentum"    # sooner where it was measured, and not always safer; docs: the study
"""


def guessed(table: datasets.Dataset, file: Path) -> Guess:
    """The task and columns that a table suggests.

    Args:
        table: some of the rows.
        file: where they come from, for messages.

    Raises:
        InputError: no column holds text.
    """
    names = list(table.column_names)
    for kind, (column, *_) in CHATS.items():
        if column in names and isinstance(table[column][0], list):
            return Guess("causal-lm", {"instructions": kind}, f"Chats, by the column {column}.", 600)
    for kind, (needed, _) in COLUMNS.items():
        if set(needed) <= set(names):
            length = _length(table, needed)
            return Guess(
                "causal-lm", {"instructions": kind}, f"Instructions, by the columns {', '.join(needed)}.", length
            )
    texts = [name for name in names if _is_text(table[name])]
    for asked, answered in (("question", "answer"), ("prompt", "completion"), ("input", "output")):
        if asked in texts and answered in texts:
            why = f"Questions and answers: only '{answered}' counts in the loss."
            return Guess("causal-lm", {"text": [asked, answered]}, why, _length(table, (asked, answered)))
    label = _label(table, texts)
    texts = [name for name in texts if name != label]
    if not texts:
        raise InputError(
            f"{file}: no column holds text",
            why=f"its columns are {', '.join(map(str, names))}",
            fix="write a recipe by hand",
        )
    ordered = sorted(texts, key=lambda name: -_length(table, (name,)))
    length = _length(table, ordered[:1])
    if label is None:
        why = f"No column looks like an answer: the text of '{ordered[0]}' itself."
        return Guess("causal-lm", {"text": ordered[0]}, why, length)
    pair = len(ordered) > 1 and 3 * _length(table, ordered[1:2]) > length
    text = [name for name in texts if name in ordered[:2]] if pair else ordered[0]
    values = {value for value in table[label] if value is not None}
    if len(values) <= MOST_CLASSES and not any(isinstance(value, float) for value in values):
        why = f"'{label}' has {len(values)} different values: classes."
        return Guess("sequence-classification", {"text": text, "label": label}, why, length)
    why = f"'{label}' holds numbers: scores."
    return Guess("sequence-regression", {"text": text, "label": label}, why, length)


def _label(table: datasets.Dataset, texts: Sequence[str]) -> str | None:
    """The column of answers: by its name, else the one with the fewest values that are not nearly all different."""
    names = list(table.column_names)
    for wanted in LABELS:
        for name in names:
            if name.lower() == wanted and (name not in texts or len(set(table[name])) <= MOST_CLASSES):
                return str(name)
    few: dict[str, int] = {name: len(set(map(str, table[name]))) for name in names}
    few = {name: count for name, count in few.items() if 2 <= count <= min(MOST_CLASSES, len(table) // 5)}
    return min(few, key=lambda name: (few[name], name)) if few else None


def _is_text(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values) and all(isinstance(v, str | None) for v in values)


def _length(table: datasets.Dataset, names: Sequence[str]) -> float:
    sizes = sorted(sum(len(str(row[name])) for name in names) for row in table)
    return float(sizes[int(0.9 * (len(sizes) - 1))])
