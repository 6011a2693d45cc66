"""Rows in: files, hub data sets, the standard library's docstrings. Out: texts and class indices, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from florana.errors import FloranaError, InputError, nearest
from florana.federation.sampling import derive
from florana.recipe import schema as r
from florana.score.glue import GLUE
from florana.train.data.docstrings import docstrings
from florana.train.data.glue_rows import glue_rows
from florana.train.data.instructions import CHATS, required
from florana.train.data.tables import read_table

DOCSTRINGS = "stdlib-docstrings"


@dataclass(frozen=True, eq=False)
class Tables:
    """Training and common test rows.

    Args:
        train: the training rows.
        test: the common test rows.
        labels: the classes' names.
        target: the column of class indices or scores, None for language.
        more: further test sets, by the ending of their figures' names.
        validation: rows to choose by, which are neither trained on nor scored; None where none are set apart.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    labels: tuple[str, ...]
    target: str | None = None
    more: Mapping[str, datasets.Dataset] = field(default_factory=dict)
    validation: datasets.Dataset | None = None


def load_tables(settings: r.Data, task: str, seed: int) -> Tables:
    """The rows of a recipe.

    Args:
        settings: the recipe's data section.
        task: the recipe's task.
        seed: of the rows that a limit draws, and of the test and validation rows that are set apart.

    Raises:
        InputError: a file or hub name that cannot be read, a column that is not there, an empty text column, a test
            label that the training rows never show, a label that GLUE's task does not have, a score that is no number.
    """
    datasets.disable_progress_bars()  # of its own bookkeeping; florana shows what takes time
    train = source(settings.train, settings.train_split, settings, task)
    if settings.test is not None:
        test = source(settings.test, settings.test_split, settings, task)
    elif settings.train == DOCSTRINGS:
        held_out = [bool(value) for value in train["held_out"]]
        test = train.select([i for i, out in enumerate(held_out) if out])
        train = train.select([i for i, out in enumerate(held_out) if not out])
    else:
        parts = train.train_test_split(test_size=settings.test_share, seed=derive(seed, "test") % 2**32)
        train, test = parts["train"], parts["test"]
    train = limited(train, settings.train_limit, derive(seed, "train limit"))
    test = limited(test, settings.test_limit, derive(seed, "test limit"))
    validation = validation_file(settings, task)
    if settings.validation_share > 0:
        parts = train.train_test_split(settings.validation_share, seed=derive(seed, "validation") % 2**32)
        train, validation = parts["train"], parts["test"]
    own = settings.validation or settings.train
    for table, name in ((train, settings.train), (test, settings.test or settings.train), (validation, own)):
        if table is not None:
            checked(table, settings, name)
    return labelled(train, test, settings, task, seed, validation)


def checked(table: datasets.Dataset, settings: r.Data, source: str) -> None:
    """Raise InputError where a column that the recipe reads is not there or has gaps, or where there are no rows."""
    for column in wanted(settings):
        require_column(table, column, source)
    if len(table) == 0:
        raise InputError(f"{source} holds no rows")


def validation_file(settings: r.Data, task: str) -> datasets.Dataset | None:
    """The rows of `data.validation`; None where it is not given. Raises InputError where they are trained on or
    scored."""
    if settings.validation is None:
        return None
    for key, other, split in (
        ("train", settings.train, settings.train_split),
        ("test", settings.test, settings.test_split),
    ):
        whole_file = Path(settings.validation).is_absolute() and "[" not in split + settings.validation_split
        if settings.validation == other and (whole_file or split == settings.validation_split):
            raise InputError(
                f"data.validation and data.{key} are the same rows: {settings.validation}",
                why="what is chosen by rows that are trained on or scored says too much of itself",
                fix="give other rows (a split, as in validation_split = 'train[:500]'), or data.validation_share",
            )
    return source(settings.validation, settings.validation_split, settings, task)


def labelled(
    train: datasets.Dataset,
    test: datasets.Dataset,
    settings: r.Data,
    task: str,
    seed: int,
    validation: datasets.Dataset | None = None,
) -> Tables:
    """Checked rows with what is to be learnt of them: classes, scores, or nothing but the text."""
    if task == "causal-lm" or settings.label is None:
        return Tables(train, test, (), validation=validation)
    if task == "sequence-regression":
        return Tables(train, test, (), settings.label, validation=validation)
    if settings.glue is not None:
        return Tables(train, test, GLUE[settings.glue].labels, settings.label, _more(settings, seed), validation)
    return _with_classes(train, test, validation, settings)


def wanted(settings: r.Data) -> list[str]:
    """The columns that a recipe reads."""
    return _columns(settings) + ([settings.label] if settings.label else [])


def _columns(settings: r.Data) -> list[str]:
    """The columns whose text is learnt."""
    if settings.instructions is not None:
        return required(settings)
    return [settings.text] if isinstance(settings.text, str) else list(settings.text)


def source(name: str, split: str, settings: r.Data, task: str) -> datasets.Dataset:
    """A file or split with the labels of GLUE's task, or the scores, in order; rows as they come."""
    table = _read(name, settings, split)
    if settings.glue is not None:
        return glue_rows(table, settings.glue, (tuple(_columns(settings)), settings.label or "label"), name)
    if task == "sequence-regression" and settings.label is not None:
        require_column(table, settings.label, name)
        return _with_scores(table, settings.label, name)
    return table


def _more(settings: r.Data, seed: int) -> dict[str, datasets.Dataset]:
    """MNLI's second test set, where it is asked for."""
    if settings.test_mismatched is None:
        return {}
    table = source(settings.test_mismatched, GLUE["mnli"].mismatched or "", settings, "sequence-classification")
    return {"mismatched": limited(table, settings.test_limit, derive(seed, "test limit"))}


def texts(table: datasets.Dataset, columns: str | Sequence[str]) -> list[tuple[str, ...]]:
    """The text of every row, as a tuple of one or two strings."""
    names = [columns] if isinstance(columns, str) else list(columns)
    return list(zip(*([str(value) for value in table[name]] for name in names), strict=True))


def _with_classes(
    train: datasets.Dataset, test: datasets.Dataset, validation: datasets.Dataset | None, settings: r.Data
) -> Tables:
    assert settings.label is not None
    # pairs: a hub name can be that of all three
    others = [(settings.test or settings.train, test)]
    if validation is not None:
        others.append((settings.validation or f"{settings.train} (validation rows)", validation))
    names_of, tables = zip(*others, strict=True)
    if settings.labels is not None:
        labels: Sequence[Any] = settings.labels
        train, *rest = (_with_given_classes(table, settings.label, labels) for table in (train, *tables))
    else:
        train, *rest = _alike([train, *tables], settings.label)
        labels = _labels_of(train, list(zip(names_of, rest, strict=True)), settings)
        index = {value: position for position, value in enumerate(labels)}
        train, *rest = (_indexed(table, settings.label, index) for table in (train, *rest))
    names = tuple(str(value) for value in labels)
    return Tables(train, rest[0], names, "class_index", validation=rest[1] if len(rest) > 1 else None)


def _labels_of(train: datasets.Dataset, others: Sequence[tuple[str, datasets.Dataset]], settings: r.Data) -> list[Any]:
    """The labels that the training rows show, sorted; each of the other tables may show no further one."""
    assert settings.label is not None
    seen = set(train[settings.label])
    labels = sorted(seen, key=lambda value: (str(type(value)), value))
    for name, table in others:
        for value in table[settings.label]:
            if value not in seen:
                raise InputError(
                    f"the label {value!r} in column '{settings.label}' of {name} never occurs in the training rows",
                    why=f"those show {', '.join(map(repr, labels[:8]))}{' ...' if len(labels) > 8 else ''}",
                    fix="check the label column of both files, or raise data.train_limit",
                )
    if len(labels) < 2:
        raise InputError(f"column '{settings.label}' of {settings.train} holds the single label {labels[0]!r}")
    return labels


def _indexed(table: datasets.Dataset, column: str, index: Mapping[Any, int]) -> datasets.Dataset:
    """The table with the class of each row as a number, in the column `class_index`."""
    values = [index[value] for value in table[column]]
    if "class_index" in table.column_names:
        table = table.remove_columns("class_index")
    return table.add_column("class_index", values)


def _alike(tables: Sequence[datasets.Dataset], column: str) -> list[datasets.Dataset]:
    """The tables as they are; with labels as text where the files have them in different types (0 and "0")."""
    if len({type(value) for table in tables for value in table[column]}) == 1:
        return list(tables)
    return [
        table.remove_columns(column).add_column(column, [str(value) for value in table[column]]) for table in tables
    ]


def _with_given_classes(table: datasets.Dataset, column: str, labels: Sequence[str]) -> datasets.Dataset:
    index = {label: position for position, label in enumerate(labels)}
    values = [str(value) for value in table[column]]
    for row, value in enumerate(values, 1):
        if value not in index:
            raise InputError(
                f"row {row} has the label '{value}' in column '{column}'",
                why=f"data.labels names {', '.join(labels)}",
                fix="mend the row, or add the label to data.labels at every site",
            )
    return table.add_column("class_index", [index[value] for value in values])


def _with_scores(table: datasets.Dataset, column: str, source: str) -> datasets.Dataset:
    """The table with that column as finite numbers."""
    scores = []
    for row, value in enumerate(table[column], 1):
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise InputError(
                f"{source}, row {row}: {value!r} in column '{column}' is no finite number",
                why="sequence-regression learns a number",
                fix="mend the row, or set task = 'sequence-classification'",
            )
        scores.append(score)
    return table.remove_columns(column).add_column(column, scores)


def _read(name: str, settings: r.Data, split: str) -> datasets.Dataset:
    if name == DOCSTRINGS:
        return _docstrings()
    path = Path(name)
    if path.is_absolute():
        words = [] if settings.instructions in CHATS else _columns(settings)
        return read_table(
            path, split, words, [*words, *([settings.label] if settings.label else [])], settings.encoding
        )
    try:
        return datasets.load_dataset(name, settings.hub_config, split=split)
    except FloranaError:
        raise
    except Exception as error:  # the hub client raises many kinds: not found, offline, no such split
        raise InputError(
            f"the data set '{name}' could not be loaded from the hub",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="check the name and the connection, or give the path of a csv, tsv, jsonl or parquet file",
        ) from None


def _docstrings() -> datasets.Dataset:
    rows = docstrings(only_topics=True)
    return datasets.Dataset.from_dict(
        {
            "text": [row.text for row in rows],
            "topic": [row.topic for row in rows],
            "module": [row.module for row in rows],
            "held_out": [row.held_out for row in rows],
        }
    )


def limited(table: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    """At most `limit` rows, drawn at random from the seed; all of them where it is None."""
    if limit is None or limit >= len(table):
        return table
    return table.shuffle(seed=seed % 2**32).select(range(limit))


def require_column(table: datasets.Dataset, column: str, source: str) -> None:
    """Check that the table has the column, with a value in each row; else an InputError that names the source."""
    if column not in table.column_names:
        raise InputError(f"{source} has no column '{column}'", fix=nearest(column, table.column_names))
    missing = sum(1 for value in table[column] if value is None or value != value)
    if missing:
        raise InputError(
            f"{source}: {missing} of {len(table)} rows have no value in column '{column}'", fix="remove these rows"
        )
