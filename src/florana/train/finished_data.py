"""Rows for a finished model: texts to ask it, and rows with answers to measure it on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from florana.errors import InputError
from florana.recipe.data_schema import Data
from florana.recipe.usage import Usage
from florana.train.data.sources import labelled, require_column, source, texts, wanted
from florana.train.data.tables import read_table
from florana.train.data.tokenize import Example
from florana.train.examples import encode
from florana.train.finished import Finished
from florana.train.limits import check_rows


def texts_of(file: Path, columns: Sequence[str] | None, usage: Usage) -> list[tuple[str, ...]]:
    """The texts in a file, as a tuple of one or two strings each.

    Args:
        file: csv, tsv, jsonl, json or parquet.
        columns: of the text; those that the model was trained on, where None (of language, the prompt's alone).
        usage: of the model.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    own = [usage.text] if isinstance(usage.text, str) else list(usage.text)
    names = list(columns) if columns else own[:1] if usage.task == "causal-lm" else own
    table = read_table(file.resolve(), "all", names, names)
    for name in names:
        require_column(table, name, str(file))
    return texts(table, names)


def rows_with_answers(
    model: Finished, file: Path, columns: Sequence[str] | None, label: str | None
) -> tuple[Example, ...]:
    """The rows of a file as the model is measured on them.

    Args:
        model: the finished model.
        file: csv, tsv, jsonl, json or parquet.
        columns: of the text; those that the model was trained on, where None.
        label: the column with the class or score; likewise.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds a class that the model does not know.
    """
    usage = model.usage
    answer = None if usage.task == "causal-lm" else label or usage.label or "label"
    place = str(file.resolve())
    settings = Data(
        glue=usage.glue,
        train=place,
        test=place,
        text=list(columns) if columns else usage.text,
        label=answer,
        labels=usage.labels or None,
        instructions=usage.instructions,
        template=usage.template,
        max_length=usage.max_length,
    )
    table = source(place, "all", settings, usage.task)
    for column in wanted(settings):
        require_column(table, column, str(file))
    if len(table) == 0:
        raise InputError(f"{file} holds no rows")
    tables = labelled(table, table, settings, usage.task, 0)
    encoded = encode(settings, model.tokenizer, tables.test, tables.target, str(file))
    check_rows(model, {str(file): dict(zip(encoded.kept, encoded.examples, strict=True))})
    return tuple(encoded.examples)
