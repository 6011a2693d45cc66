"""Rows of a GLUE task in one form, from the hub or from files, with every label checked."""

from __future__ import annotations

from collections.abc import Sequence

import datasets

from florana.errors import InputError, nearest
from florana.score.glue import GLUE, Columns, glue_label


def glue_rows(table: datasets.Dataset, name: str, given: Columns, source: str) -> datasets.Dataset:
    """The table with the task's columns under the recipe's names, and each label as an index or a score.

    A file is read by the first columns it has of: the recipe's (`given`), the hub's, those of GLUE's own files.

    Raises:
        InputError: the columns are not there, or a label is none of the task's (row and value named).
    """
    task = GLUE[name]
    layouts = [given, task.columns, *([task.tsv] if task.tsv is not None else [])]
    found = next((own for own in layouts if {*own[0], own[1]} <= set(table.column_names)), None)
    if found is None:
        raise _no_columns(table, name, layouts, source)
    labels: list[int | float] = []
    for row, value in enumerate(table[found[1]], 1):
        try:
            labels.append(glue_label(name, value))
        except ValueError as error:
            raise InputError(
                f"{source}, row {row}, column '{found[1]}': {error}",
                fix=f"give a file or split with labels: GLUE's '{task.test}' is the one to measure on",
            ) from None
    for old, new in zip(found[0], given[0], strict=True):
        if old != new:
            table = table.remove_columns(new) if new in table.column_names else table
            table = table.rename_column(old, new)
    kept = [column for column in table.column_names if column not in (given[1], found[1])]
    return table.select_columns(kept).add_column(given[1], labels)


def _no_columns(table: datasets.Dataset, name: str, layouts: Sequence[Columns], source: str) -> InputError:
    text, label = min(layouts, key=lambda own: len({*own[0], own[1]} - set(table.column_names)))
    lacks = [column for column in (*text, label) if column not in table.column_names]
    unlabelled = label in lacks and set(text) <= set(table.column_names)
    return InputError(
        f"{source} has no column {' and no column '.join(map(repr, lacks))}, which GLUE's '{name}' needs",
        why="GLUE's test split comes without labels" if unlabelled else f"it has {', '.join(table.column_names)}",
        fix=f"{nearest(lacks[0], table.column_names)}; data.text and data.label name columns of your own",
    )
