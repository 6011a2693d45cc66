"""Files of rows are looked at before they are read: what would take all memory is refused by name.

A file may be as large as it likes. It may not become far more than it is: a packed text that grows a hundredfold, a
line that does not end, more columns than anybody writes, a page of values that stands for a billion.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from florana.errors import InputError

COLUMNS = 10_000
LINE_BYTES = 2**24
"""Of one line of a text file."""
CELLS = 50_000_000
"""Of a parquet file: rows times columns, and values in lists."""
GROWTH = 100
"""Times that a file may grow when it is unpacked, beyond `PLAIN_BYTES`: text grows five to twenty times."""
PLAIN_BYTES = 2**27
JSON_BYTES = 2**28
"""Of a json file, which is read whole; one of lines may have any size."""

_PIECE = 2**20


def require_bounded(path: Path, kind: str) -> None:
    """Raise InputError where a text file would become far more than it is.

    Args:
        path: the file, perhaps packed (`.gz`).
        kind: its ending without that: `.csv`, `.tsv`, `.jsonl` or `.json`.

    Raises:
        InputError: naming the bound.
        OSError: the file cannot be read.
        EOFError: a packed file is damaged.
    """
    packed = path.suffix.lower() == ".gz"
    most = max(PLAIN_BYTES, GROWTH * path.stat().st_size) if packed else None
    done, line, first = 0, 0, True
    with gzip.open(path, "rb") if packed else path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            done += len(piece)
            if most is not None and done > most:
                raise _too_much(path, f"unpacked it has more than {most} bytes, {GROWTH} times what it is")
            if kind == ".json":
                if done > JSON_BYTES:
                    raise _too_much(path, f"it has more than {JSON_BYTES} bytes", "write jsonl, one row per line")
                continue
            if first and kind in (".csv", ".tsv"):
                head = piece.split(b"\n", 1)[0]
                if head.count(b"\t" if kind == ".tsv" else b",") >= COLUMNS:
                    raise _too_much(path, f"its first line names more than {COLUMNS} columns")
            first = False
            start = piece.find(b"\n")
            if line + (len(piece) if start < 0 else start) > LINE_BYTES:
                raise _too_much(path, f"a line has more than {LINE_BYTES} bytes")
            line = line + len(piece) if start < 0 else len(piece) - 1 - piece.rfind(b"\n")


def require_few_columns(count: int, path: Path) -> None:
    """Raise InputError where rows have more columns between them than `COLUMNS`."""
    if count > COLUMNS:
        raise _too_much(path, f"its rows have more than {COLUMNS} columns between them")


def read_parquet(path: Path) -> pd.DataFrame:
    """A parquet file as a frame; a text that stands there many times is held once.

    Raises:
        InputError: it has too many columns or values, or would become far more than it is.
    """
    with pq.ParquetFile(path) as file:
        facts = file.metadata
        require_few_columns(facts.num_columns, path)
        groups = [facts.row_group(index) for index in range(facts.num_row_groups)]
        values = sum(group.column(index).num_values for group in groups for index in range(group.num_columns))
        if max(values, facts.num_rows * facts.num_columns) > CELLS:
            raise _too_much(path, f"it holds more than {CELLS} values")
        size = sum(group.total_byte_size for group in groups)
        if size > max(PLAIN_BYTES, GROWTH * path.stat().st_size):
            raise _too_much(path, f"unpacked it has {size} bytes, more than {GROWTH} times what it is")
        words = [field.name for field in file.schema_arrow if str(field.type) in ("string", "large_string")]
    frame = pq.read_table(path, read_dictionary=words).to_pandas()
    for name in words:
        if name in frame.columns and isinstance(frame[name], pd.Series):
            texts = frame[name].astype(object)
            frame[name] = texts.where(texts.notna(), None)
    return frame


def _too_much(path: Path, why: str, fix: str = "") -> InputError:
    return InputError(
        f"{path} is not read", why=why, fix=fix or "if it is what it should be, split it into several files"
    )
