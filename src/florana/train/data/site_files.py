"""Rows that lie in one file per client: each site has its own, a rehearsal has all of them in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import datasets

from florana.errors import InputError
from florana.federation.sampling import derive
from florana.recipe import schema as r
from florana.train.data.partition import SITE
from florana.train.data.sources import (
    Tables,
    checked,
    labelled,
    limited,
    require_column,
    source,
    validation_file,
    wanted,
)


def site_files(settings: r.Data) -> dict[str, Path]:
    """Client -> its file, where `data.train` is a folder with one file per client. Raises InputError."""
    folder = Path(settings.train)
    if not folder.is_dir():
        raise InputError(
            f"data.train = '{folder}' is not a folder",
            why="partition.kind = 'sites' takes one file per client from it",
            fix="give a folder with files such as hospital-a.csv, or choose another partition.kind",
        )
    files = {path.name.partition(".")[0]: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    if not files:
        raise InputError(f"the folder {folder} holds no file")
    return files


def load_sites(settings: r.Data, task: str, seed: int, files: Mapping[str, Path]) -> Tables:
    """The rows of the clients that are here, and the common test set where there is one; either may be empty.

    Args:
        settings: the recipe's data section.
        task: the recipe's task.
        seed: of the sampling of rows.
        files: client -> its own file (none at all at a server). `data.train_limit` holds for each.

    Raises:
        InputError: a file that cannot be read, a column or label that it should not have or lacks.
    """
    datasets.disable_progress_bars()
    columns, tables = wanted(settings), []
    for client, path in files.items():
        table = source(str(path.resolve()), settings.train_split, settings, task)
        for column in columns:
            require_column(table, column, str(path))
        table = limited(table.select_columns(columns), settings.train_limit, derive(seed, "train limit", client))
        tables.append(table.add_column(SITE, [client] * len(table)))
    empty = datasets.Dataset.from_dict({column: [] for column in (*columns, SITE)})
    test = empty
    if settings.test is not None:
        test = source(settings.test, settings.test_split, settings, task)
        for column in columns:
            require_column(test, column, settings.test)
        test = limited(test, settings.test_limit, derive(seed, "test limit"))
    validation = validation_file(settings, task)
    if validation is not None:
        checked(validation, settings, settings.validation or "data.validation")
    train = datasets.concatenate_datasets(tables) if tables else empty
    return labelled(train, test, settings, task, seed, validation)
