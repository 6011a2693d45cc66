"""Files of rows as people have them: mixed columns beside the text, broken lines, other encodings; the row is named."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from florana.errors import InputError
from florana.recipe.data_schema import Data
from florana.train.data.sources import load_tables
from florana.train.data.tables import read_table


def read(path: Path, texts: list[str] | None = None) -> list[dict[str, Any]]:
    names = texts or ["text"]
    return read_table(path, "train", names, [*names, "label"]).to_list()


def lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_that_are_not_read_may_hold_anything(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": 0, "id": 1, "meta": {"x": 1}, "when": None, "big": 2**80},
        {"text": "b", "label": 1, "id": "two", "meta": [1, "x"], "when": "now", "big": 1},
    ]
    got = read(lines(tmp_path / "t.jsonl", rows))
    assert [(row["text"], row["label"], row["id"], row["meta"]) for row in got] == [
        ("a", 0, "1", '{"x": 1}'),
        ("b", 1, "two", '[1, "x"]'),
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert read(tmp_path / "t.json") == got


def test_a_text_column_is_text_and_a_whole_number_stays_one(tmp_path: Path) -> None:
    assert [row["text"] for row in read(lines(tmp_path / "t.jsonl", [{"text": "a"}, {"text": 7}]))] == ["a", "7"]
    (tmp_path / "t.csv").write_text("text,label,n\r\n007,1,\r\ntrue,0,3\r\n")
    assert [(row["text"], row["label"]) for row in read(tmp_path / "t.csv")] == [("007", 1), ("true", 0)]
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": None}]
    assert [row["label"] for row in read(lines(tmp_path / "u.jsonl", rows))] == [1, None]


def test_bom_empty_lines_gzip_and_odd_parquet_types(tmp_path: Path) -> None:
    content = '\n{"text": "é", "label": 1}\r\n\r\n{"text": "b", "label": 2}\n'
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("t.jsonl", "t.jsonl.gz"):
        assert [row["text"] for row in read(tmp_path / name)] == ["é", "b"]
    frame = pd.DataFrame(
        {
            "text": ["a", "b"],
            "label": [decimal.Decimal("1"), decimal.Decimal("2")],
            "day": [datetime.date(2026, 1, 1)] * 2,
            "raw": [b"\xff", b"x"],
            "nested": [[1], [2]],
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    assert [row["label"] for row in read(tmp_path / "t.parquet")] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["line 2", "mend"]),
        ("t.jsonl", b'{"text": "a"}\n[1, 2]\n', ["line 2", "a list"]),
        ("t.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', ["row 2", "'text'", "a list"]),
        ("t.jsonl", b'{"text": "a", "label": {"x": 1}}\n', ["row 1", "'label'", "an object"]),
        ("t.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ["line 2", "UTF-8"]),
        ("t.csv", b"text,label\na,1\n\xe9,2\n", ["line 3", "UTF-8"]),
        ("t.csv", b"text,label\na,1\nb,2,3\n", ["line 3"]),
        ("t.csv", b"", ["cannot be read as csv"]),
        ("t.json", b'"text"', ["not a list of rows"]),
        ("t.json", b'[{"text": "a"}, 3]', ["row 2"]),
        ("t.json", b"[" * 100000, ["cannot be read as json"]),
        ("t.jsonl", b"[" * 100000, ["line 1"]),
        ("t.parquet", b"PAR1", ["cannot be read as parquet"]),
        ("t.jsonl.gz", b"no gzip", ["cannot be read as jsonl"]),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_labels_of_unlike_types_in_two_files_are_the_same_classes(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    test = lines(tmp_path / "test.jsonl", [{"text": "a", "label": "1"}])
    settings = Data(train=str(train), test=str(test), text="text", label="label")
    tables = load_tables(settings, "sequence-classification", 0)
    assert tables.labels == ("0", "1")
    assert list(tables.test[tables.target]) == [1]
