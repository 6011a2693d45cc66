"""Small files that would take a parser all memory, or hours: each is refused by name, at once and in little memory."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from florana import bounded
from florana.adapters.adapter_folder import read_adapter
from florana.adapters.safetensors_io import no_twins
from florana.errors import FloranaError, InputError, RecipeError
from florana.recipe.load import read_recipe
from florana.runs.run_folder import read_run
from florana.score.benchmarks import read_problems
from florana.train.data import bounds
from florana.train.data.tables import read_table
from tests.conftest import ROOT

DEEP = 100_000
TOML: dict[str, str] = {
    "dotted keys": "a" + ".a" * 50_000 + " = 1",
    "dotted keys with spaces": "a" + " . a" * 20_000 + " = 1",
    "quoted dotted keys": '"a"' + '."a"' * 20_000 + " = 1",
    "single quoted dotted keys": "'a'" + ".'a'" * 20_000 + " = 1",
    "a dotted table": "[a" + ".a" * 50_000 + "]",
    "a dotted list of tables": "[[a" + ".a" * 50_000 + "]]",
    "a dotted key in a table": "x = {a" + ".a" * 20_000 + " = 1}",
    "many dotted keys": "\n".join("a" + ".a" * 70 + f".k{i} = 1" for i in range(2000)),
    "nested lists": "x = " + "[" * DEEP + "]" * DEEP,
    "nested lists, open": "x = " + "[" * DEEP,
    "nested tables": "x = " + "{a = " * 20_000 + "1" + "}" * 20_000,
    "a large number": "x = " + "9" * 200_000,
    "a large file": "x = '" + "y" * 2**21 + "'",
    "many values": "x = [" + "1," * 300_000 + "]",
    "many keys": "\n".join(f"k{i} = 1" for i in range(250_000))[: 2**20],
    "no TOML": "\x00" * 1000,
}


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Ten seconds for each, and as much for a machine that is busy."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 10


@pytest.mark.parametrize("kind", TOML)
def test_recipes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TOML[kind])
    with pytest.raises(RecipeError):
        read_recipe(path)
    with suppress(FloranaError):  # what is no value of TOML is a word
        read_recipe(ROOT / "recipes" / "sst2-minilm.toml", [f"title={TOML[kind].removeprefix('x = ')}"])
    (tmp_path / "recipe.toml").write_text(TOML[kind])
    with pytest.raises(InputError):
        read_run(tmp_path)


def test_texts_with_dots_and_brackets_are_no_bombs() -> None:
    dots = ".".join("a" * 200)
    assert bounded.toml(f'x = "{dots}" # {"[" * 200}\ny = """\n{"{" * 200}"""\nz = \'{dots}\'')["x"] == dots
    assert bounded.toml("a.b.c.d = [[1, 2], [3]]") == {"a": {"b": {"c": {"d": [[1, 2], [3]]}}}}


def test_each_bound_refuses_by_itself(tmp_path: Path) -> None:
    """What a parser behind a bound would refuse too, or read in time, is refused before it."""
    (tmp_path / "eleven").write_bytes(bytes(11))
    assert bounded.read_bytes(tmp_path / "eleven", 11) == bytes(11)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        bounded.read_bytes(tmp_path / "eleven", 10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is no file"):
        bounded.read_bytes(tmp_path / "pipe", 10)
    with pytest.raises(ValueError, match="characters"):
        bounded.toml("x = 1 #" + "y" * bounded.TOML_BYTES)
    with pytest.raises(ValueError, match="values"):
        bounded.toml("x = [" + "1," * (bounded.MANY + 1) + "]")
    assert bounded.unpacked(gzip.compress(bytes(10)), 10) == bytes(10)
    with pytest.raises(ValueError, match="10 bytes when it is unpacked"):
        bounded.unpacked(gzip.compress(bytes(11)), 10)


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 1}
JSON: dict[str, str] = {
    "nested lists": "[" * DEEP + "]" * DEEP,
    "nested lists, open": "[" * DEEP,
    "nested objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "a large number": '{"r": ' + "9" * 100_000 + "}",
    "a large file": json.dumps({"x": "y" * (2**24 + 1)}),
    "many keys": json.dumps({f"k{i}": 0 for i in range(1_200_000)}),
    "many twins": "{" + ",".join('"k":0' for _ in range(200_000)) + "}",
    "twins at the end": "{" + ",".join(f'"k{i}":0' for i in range(60_000)) + ',"k0":1}',
    "a pattern of its own size": json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": "a" * 2**20}
    ),
    "many patterns": json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "rank_pattern": {f"k{i}": 1 for i in range(200_000)}}
    ),
}


@pytest.mark.parametrize("kind", JSON)
def test_configurations_of_adapters(kind: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(JSON[kind])
    (tmp_path / "adapter_model.safetensors").write_bytes(weights({"base_model.model.q.lora_A.weight": [2, 2]}))
    with pytest.raises(InputError):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors.index.json").write_text(JSON[kind])
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    with pytest.raises(InputError):
        read_adapter(tmp_path)


def weights(shapes: dict[str, list[int]], lie: Callable[[bytes], bytes] = lambda header: header) -> bytes:
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = lie(json.dumps(header).encode())
    return struct.pack("<Q", len(text)) + text + bytes(start)


HEADERS: dict[str, bytes] = {
    "of a length that is not there": struct.pack("<Q", 2**60) + b"{}",
    "of a length beyond the bound": struct.pack("<Q", 2**26) + b" " * 100,
    "nested": weights({}, lambda header: b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "of many tensors": weights({f"base_model.model.m{i}.lora_A.weight": [1, 1] for i in range(60_000)}),
    "of twins": weights({}, lambda header: b"{" + b",".join(b'"k":{}' for _ in range(60_000)) + b"}"),
    "of a huge shape": weights(
        {}, lambda header: b'{"q":{"dtype":"F32","shape":[9999999999,9999999999],"data_offsets":[0,4]}}'
    ),
    "of offsets that lie": weights({}, lambda header: b'{"q":{"dtype":"F32","shape":[1,1],"data_offsets":[-4,0]}}'),
    "empty": b"",
    "short": b"\x01",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_weight_files(kind: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q"]}'
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(InputError):
        read_adapter(tmp_path)


def test_the_search_for_twins_is_linear() -> None:
    pairs = [(f"k{i}", 0) for i in range(200_000)] + [("k199999", 1)]
    with pytest.raises(ValueError, match="'k199999' stands there twice"):
        no_twins(pairs)


def packed(content: bytes, times: int) -> bytes:
    """gzip of `content` many times over, without having it all at once."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(squeeze.compress(content) for _ in range(times)) + squeeze.flush()


ROWS: dict[str, Callable[[Path], Path]] = {
    "csv of many columns": lambda d: put(d / "a.csv", ",".join(f"c{i}" for i in range(1_000_000)).encode() + b"\n1\n"),
    "tsv of many columns": lambda d: put(d / "a.tsv", "\t".join(f"c{i}" for i in range(20_000)).encode() + b"\n1\n"),
    "csv of one cell": lambda d: put(d / "a.csv", b"text,label\n" + b"x" * (2**24 + 2**20) + b",1\n"),
    "csv without an end": lambda d: put(d / "a.csv", b'text,label\n"' + b"x" * (2**24 + 2**20)),
    "csv packed": lambda d: put(d / "a.csv.gz", packed(b"text,label\n" * 10_000, 2000)),
    "jsonl of one line": lambda d: put(d / "a.jsonl", b'{"text": "' + b"x" * (2**24 + 2**20) + b'"}'),
    "jsonl nested": lambda d: put(d / "a.jsonl", b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}"),
    "jsonl of many columns": lambda d: put(
        d / "a.jsonl", b"\n".join(b'{"text": "a", "k%d": 1}' % i for i in range(12_000))
    ),
    "jsonl packed": lambda d: put(d / "a.jsonl.gz", packed(b'{"text": "a"}\n' * 10_000, 2000)),
    "json nested": lambda d: put(d / "a.json", b"[" * DEEP + b"]" * DEEP),
    "json packed": lambda d: put(d / "a.json.gz", packed(b" " * 2**20, 200)),
    "json of many columns": lambda d: put(
        d / "a.json", b"[" + b",".join(b'{"text": "a", "k%d": 1}' % i for i in range(12_000)) + b"]"
    ),
    "gzip of nothing": lambda d: put(d / "a.csv.gz", b"\x1f\x8b\x08\x00"),
    "no gzip": lambda d: put(d / "a.jsonl.gz", b"text"),
    "parquet of many columns": lambda d: table(d, pa.table({f"c{i}": [1] for i in range(11_000)})),
    "parquet of many rows": lambda d: table(
        d, pa.table({"n": pa.array([0], pa.int8()).take(pa.array([0] * 60_000_000, pa.int32()))})
    ),
    "parquet of long lists": lambda d: table(d, pa.table({"n": lists(60_000_000)})),
    "no parquet": lambda d: put(d / "a.parquet", b"PAR1" + b"\xff" * 1000 + b"PAR1"),
}


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def lists(values: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, values], pa.int32()), pa.nulls(values, pa.int8()))


def table(folder: Path, rows: pa.Table) -> Path:
    pq.write_table(rows, folder / "a.parquet", compression="zstd")
    return folder / "a.parquet"


@pytest.mark.parametrize("kind", ROWS)
def test_files_of_rows(kind: str, tmp_path: Path) -> None:
    path = ROWS[kind](tmp_path)
    started = time.process_time()
    with pytest.raises(InputError):
        read_table(path, "train", ["text"], ["text", "label"])
    assert time.process_time() - started < 10


def test_a_text_that_stands_there_many_times_is_held_once(tmp_path: Path) -> None:
    """A dictionary of one long text: 12 GB, were each row to have its own."""
    long = "x" * 2**20
    rows = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 12_000, pa.int32()), [long]).cast(
        pa.dictionary(pa.int32(), pa.string())), "label": [0] * 12_000})  # fmt: skip
    pq.write_table(rows.replace_schema_metadata(None), tmp_path / "a.parquet", compression="zstd")
    code = (
        "import sys; from pathlib import Path; from florana.train.data.bounds import read_parquet\n"
        "frame = read_parquet(Path(sys.argv[1])); print(len(frame), len(frame['text'].iloc[-1]))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows_read, peak = done.stdout.splitlines()
    assert rows_read == f"12000 {2**20}"
    assert int(peak) < 500_000  # KiB, of this program alone; a row's own copy of its text took 11.9 GB


def test_honest_files_of_rows_come_out_as_before(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a", None, "c"], "label": [1, 2, 3], "id": ["x", "y", "z"]})
    frame.to_parquet(tmp_path / "a.parquet")
    rows = read_table(tmp_path / "a.parquet", "train", ["text"], ["text", "label"])
    assert rows.to_dict() == {"text": ["a", None, "c"], "label": [1, 2, 3], "id": ["x", "y", "z"]}
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "a"}\n' * 50_000)
    assert len(read_table(tmp_path / "b.jsonl.gz", "train", ["text"], ["text"])) == 50_000
    assert bounds.GROWTH >= 100


@pytest.mark.parametrize("kind", ["nested", "packed", "large"])
def test_files_of_problems(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        "nested": b"[" * DEEP,
        "packed": packed(b'{"question": "q", "answer": "#### 1"}\n' * 1000, 5000),
        "large": b" " * (2**20 + 1),
    }
    if kind == "large":
        monkeypatch.setattr("florana.score.benchmarks.PROBLEM_BYTES", 2**20)
    with pytest.raises(InputError):
        read_problems("gsm8k", put(tmp_path / "p.jsonl", contents[kind]))
