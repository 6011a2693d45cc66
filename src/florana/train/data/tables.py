"""Files of rows: csv, tsv, jsonl, json, parquet, whatever else their columns hold. Text is taken as text.

Only the columns that a recipe reads must be clean. What stands beside them may hold anything: a column of numbers and
words, of objects and lists, is kept as text, so that a split can still go by it.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa

from florana.bounded import json_of
from florana.errors import InputError
from florana.train.data.bounds import read_parquet, require_bounded, require_few_columns

_CELLS: dict[str, Any] = {
    "keep_default_na": False,
    "na_values": [""],
    "low_memory": False,
}
"""Of csv and tsv: only an empty cell is missing; `NA`, `null` and `None` are words that sentences have. A column has
one type, found from all of its rows."""

_SCALARS = (str, bool, int, float, decimal.Decimal, datetime.date, datetime.time)


def read_table(
    path: Path, split: str, texts: Sequence[str], values: Collection[str], encoding: str = "utf-8"
) -> datasets.Dataset:
    """The rows of a file as a data set.

    Args:
        path: an absolute path; the ending says what it is (`.gz` after it is unpacked).
        split: `train[600:974]` takes rows by number; without brackets all.
        texts: the columns that are read as text: `007` in a csv file stays `007`.
        values: the columns that must hold one text or number per row.
        encoding: of a file of text; a byte order mark is passed over.

    Raises:
        InputError: the file cannot be read; the line, row and column are named where they are known.
    """
    frame = _sliced(_read_file(path, texts, encoding), split, path)
    frame.columns = pd.Index([str(column) for column in frame.columns])
    for column in values:
        if column in frame.columns:
            _require_scalars(frame[column], column, path)
    ready = {column: _storable(frame[column]) for column in dict.fromkeys(frame.columns)}
    return datasets.Dataset.from_pandas(pd.DataFrame(ready), preserve_index=False)


def _require_scalars(values: Any, column: str, path: Path) -> None:
    if isinstance(values, pd.DataFrame):
        raise InputError(f"{path} has the column '{column}' twice", fix="rename or remove one of them")
    if values.dtype != object:
        return
    for row, value in enumerate(values, 1):
        if value is not None and not isinstance(value, _SCALARS) and not pd.api.types.is_scalar(value):
            raise InputError(
                f"{path}, row {row}: column '{column}' holds {_kind(value)}, not a text or a number",
                fix="write the text itself into the column, or name another column in the recipe",
            )
        if isinstance(value, bytes):
            raise InputError(
                f"{path}, row {row}: column '{column}' holds bytes, not text", fix="store the column as UTF-8 text"
            )


def _kind(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", bytes: "bytes"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _storable(values: Any) -> Any:
    """The column as it is where Arrow can hold it, else as text."""
    if isinstance(values, pd.DataFrame):
        values = values.iloc[:, 0]
    try:
        stored = pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return values.map(_as_text)
    if pa.types.is_decimal(stored.type):
        return values.map(_as_text)
    return values


def _as_text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and value != value):
        return None
    return value if isinstance(value, str) else _dumped(value) if isinstance(value, dict | list) else str(value)


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _read_file(path: Path, texts: Sequence[str], given: str) -> pd.DataFrame:
    encoding = "utf-8-sig" if given.lower().replace("_", "-") in ("utf-8", "utf8") else given
    suffixes = [suffix for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1].lower() if suffixes else ""
    words = dict.fromkeys(texts, str)
    readers: dict[str, Any] = {
        ".csv": lambda: pd.read_csv(path, dtype=words, encoding=encoding, **_CELLS),
        ".tsv": lambda: pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=words, encoding=encoding, **_CELLS),
        ".jsonl": lambda: _read_lines(path, encoding),
        ".json": lambda: _read_json(path, encoding),
        ".parquet": lambda: read_parquet(path),
    }
    if kind not in readers:
        raise InputError(f"{path}: the file type '{kind}' is not known", fix=f"one of {', '.join(readers)}")
    if not path.exists():
        raise InputError(f"the data file {path} does not exist", fix="relative paths count from the recipe's folder")
    try:
        if kind != ".parquet":
            require_bounded(path, kind)
        frame = readers[kind]()
    except UnicodeError as error:
        raise InputError(
            f"{path}, line {_undecodable(path, encoding)}: it is not {'UTF-8' if encoding == 'utf-8-sig' else given}",
            why=str(error),
            fix="save the file as UTF-8 (a spreadsheet's 'CSV UTF-8'), or name what it is by data.encoding "
            "(of `init`: --encoding)",
        ) from None
    except InputError:
        raise
    except Exception as error:  # pandas and pyarrow raise many kinds
        raise InputError(f"{path} cannot be read as {kind[1:]}", why=str(error).splitlines()[0]) from None
    if not isinstance(frame, pd.DataFrame) or frame.empty:
        raise InputError(f"{path} holds no rows")
    return frame


def _opened(path: Path, encoding: str) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=encoding)
    return path.open(encoding=encoding)


def _undecodable(path: Path, encoding: str) -> int:
    """The number of the first line that cannot be decoded."""
    number = 1
    try:
        with _opened(path, encoding) as file:
            for number, _ in enumerate(file, 2):  # noqa: B007  (the line after the last one read)
                pass
    except UnicodeError:
        return _exactly(path, number) if encoding == "utf-8-sig" else number
    return number


def _exactly(path: Path, least: int) -> int:
    """Of UTF-8 the very line: text is decoded in pieces of many lines."""
    content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return least


def _read_lines(path: Path, encoding: str) -> pd.DataFrame:
    """One JSON object per line; empty lines are passed over."""
    rows: list[dict[str, Any]] = []
    with _opened(path, encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json_of(line)
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number}: it is not a JSON object", why=str(error), fix="mend or remove the line"
                ) from None
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, line {number}: it holds {_kind(row)}, not an object of columns",
                    fix='write each row as {"text": ..., "label": ...}',
                )
            rows.append(row)
    return _framed(rows, path)


def _read_json(path: Path, encoding: str) -> pd.DataFrame:
    """A list of objects, or an object of objects keyed by an id (which is dropped), or an object of columns."""
    with _opened(path, encoding) as file:
        whole = json_of(file.read())
    if isinstance(whole, dict) and whole and all(isinstance(inner, dict) for inner in whole.values()):
        whole = _of_objects(whole)
    if isinstance(whole, dict) and all(isinstance(column, list) for column in whole.values()):
        return pd.DataFrame(whole)
    if not isinstance(whole, list):
        raise InputError(f"{path} holds {_kind(whole)}, not a list of rows", fix="write a list of objects")
    for number, row in enumerate(whole, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: it holds {_kind(row)}, not an object of columns")
    return _framed(whole, path)


def _of_objects(whole: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of {id: row}, or of {column: {row number: value}} as pandas writes it: there are more rows than columns."""
    inner = next(iter(whole.values()))
    if len(whole) > len(inner):
        return list(whole.values())
    return [{column: cells.get(row) for column, cells in whole.items()} for row in inner]


def _framed(rows: Sequence[dict[str, Any]], path: Path) -> pd.DataFrame:
    """Rows as columns, each cell as it was written (a whole number beside an empty cell stays one)."""
    columns = dict.fromkeys(key for row in rows for key in row)
    require_few_columns(len(columns), path)
    frame = pd.DataFrame({column: pd.Series([row.get(column) for row in rows], dtype=object) for column in columns})
    return frame.infer_objects()


def _sliced(frame: pd.DataFrame, split: str, path: Path) -> pd.DataFrame:
    """The rows that a split's brackets name; all without brackets. Raises InputError."""
    if "[" not in split:
        return frame
    found = re.fullmatch(r"[^\[\]]*\[(\d*):(\d*)\]", split)
    if found is None:
        raise InputError(
            f"the split {split!r} of {path} cannot be read",
            why="of a file, rows are named by number: the first one counts as 0, the last one is left out",
            fix="for example train[600:974]",
        )
    rows = frame.iloc[int(found[1] or 0) : int(found[2]) if found[2] else None].reset_index(drop=True)
    if rows.empty:
        raise InputError(f"the split {split!r} of {path} holds no rows", why=f"the file has {len(frame)}")
    return rows
