"""Rows of files and the hub, their parts for clients, and what is said where data cannot be used."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from florana.errors import InputError
from florana.recipe.schema import Data, Partition, Recipe
from florana.train.data.partition import deal
from florana.train.data.sources import load_tables
from florana.train.data.tokenize import IGNORED, encode_language
from florana.train.model import Workbench

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Letters:
    """A tokenizer of letters: a is 10, b is 11, and so on."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 87 for letter in text]}


def test_language_examples_predict_the_answer_only_and_always_something() -> None:
    (plain,) = encode_language([("abc",)], Letters(), 10)
    assert plain.ids == (1, 10, 11, 12, 2)
    assert plain.labels == (IGNORED, 10, 11, 12, 2)
    (pair,) = encode_language([("ab", "cd")], Letters(), 10)
    assert pair.ids == (1, 10, 11, 12, 13, 2)
    assert pair.labels == (IGNORED, IGNORED, IGNORED, 12, 13, 2)
    (long,) = encode_language([("abcdefgh", "xyz")], Letters(), 7)
    assert long.ids == (1, 15, 16, 17, 33, 34, 35)  # the prompt keeps its end, the answer its beginning
    assert long.labels == (IGNORED,) * 4 + (33, 34, 35)


def test_a_text_without_anything_to_predict_is_refused() -> None:
    class NoEnds(Letters):
        bos_token_id, eos_token_id = None, None  # type: ignore[assignment]

    with pytest.raises(InputError, match="text 1 has no token to predict"):
        encode_language([("abc",), ("a",)], NoEnds(), 10)


TABLE = datasets.Dataset.from_dict(
    {
        "text": [f"row {i}" for i in range(200)],
        "label": [i % 4 for i in range(200)],
        "site": [f"s{i % 3}" for i in range(200)],
    }
)


KINDS: dict[str, dict[str, Any]] = {
    "iid": {"clients": 5},
    "dirichlet": {"clients": 5, "alpha": 0.5},
    "pathological": {"clients": 4, "classes": 2},
    "column": {"by": "site"},
    "length": {"clients": 5},
    "linear": {"clients": 5},
    "square": {"clients": 4},
    "exponential": {"clients": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_goes_to_exactly_one_client_and_the_deal_is_a_function_of_the_seed(kind: str) -> None:
    settings = Partition(kind=kind, holdout=0.2, **KINDS[kind])
    lengths = [(7 * i) % 50 for i in range(200)]

    def hand_out(seed: int) -> dict[str, Any]:
        return deal(TABLE, settings, "label", lengths, seed)

    shares = hand_out(3)
    rows = [row for share in shares.values() for row in (*share.train, *share.test)]
    assert sorted(rows) == list(range(200))
    assert hand_out(3) == shares
    assert hand_out(4) != shares
    assert len(shares) == (3 if kind == "column" else KINDS[kind]["clients"])
    if kind == "column":
        for share in shares.values():
            assert len({TABLE[row]["site"] for row in share.train}) == 1
    if kind == "length":
        spans = [
            (min(lengths[r] for r in s.train + s.test), max(lengths[r] for r in s.train + s.test))
            for s in shares.values()
        ]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    if kind == "pathological":
        assert all(len({TABLE[row]["label"] for row in (*s.train, *s.test)}) == 2 for s in shares.values())
    if kind in ("linear", "square", "exponential"):
        sizes = [len(s.train) for s in shares.values()]
        assert max(sizes) > 1.5 * min(sizes)
    if kind == "iid":
        assert all(len({TABLE[row]["label"] for row in s.train}) == 4 for s in shares.values())


def test_too_many_clients_are_an_error_that_says_what_to_change() -> None:
    with pytest.raises(InputError) as caught:
        deal(TABLE, Partition(kind="iid", clients=150), "label", [1] * 200, 0)
    assert "partition.smallest" in str(caught.value)
    with pytest.raises(InputError) as caught:
        deal(TABLE, Partition(kind="dirichlet", clients=60, alpha=0.01, smallest=5), "label", [1] * 200, 0)
    assert "fewer clients" in str(caught.value)


ROWS = [("good film", "1"), ('a "quoted, bad one', "0"), ("fine", "1"), ("dull", "0")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "json by id", "parquet"])
def test_the_same_rows_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame(ROWS, columns=["text", "label"])
    path = tmp_path / f"rows.{kind.split()[0]}"
    match kind:
        case "csv":
            frame.to_csv(path, index=False)
        case "tsv":
            path.write_text("text\tlabel\n" + "".join(f"{t}\t{c}\n" for t, c in ROWS))
        case "jsonl":
            path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in ROWS))
        case "json":
            path.write_text(json.dumps([{"text": t, "label": c} for t, c in ROWS]))
        case "json by id":
            path.write_text(json.dumps({str(i): {"text": t, "label": c} for i, (t, c) in enumerate(ROWS)}))
        case "parquet":
            frame.to_parquet(path)
    data = Data(train=str(path), test=str(path), label="label")
    tables = load_tables(data, "sequence-classification", 0)
    assert list(tables.train["text"]) == [text for text, _ in ROWS]
    assert list(tables.train["class_index"]) == [1, 0, 1, 0]
    assert tables.labels == ("0", "1")


@pytest.mark.parametrize(
    ("content", "change", "words"),
    [
        ("text,label\na,1\nb,0\n", {"train": "missing.csv"}, "missing.csv does not exist"),
        ("text,label\na,1\nb,0\n", {"text": "txt"}, "has no column 'txt'"),
        ("text,label\na,1\nb,0\n", {"label": "lable"}, "did you mean 'label'"),
        ("text,label\n,1\nb,0\n", {}, "1 of 2 rows have no value in column 'text'"),
        ("text,label\na,1\nb,1\n", {}, "the single label"),
        ("text,label\n", {}, "holds no rows"),
        ("", {}, "cannot be read as csv"),
        ("text,label\na,1\nb,0\n", {"train": "x.docx"}, "the file type '.docx' is not known"),
    ],
)
def test_data_that_cannot_be_used_is_explained(
    content: str, change: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    settings = {"train": str(path), "test": str(path), "label": "label"} | change
    settings["train"] = str(tmp_path / Path(settings["train"]).name)
    with pytest.raises(InputError) as caught:
        load_tables(Data(**settings), "sequence-classification", 0)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_label_of_the_test_set_that_no_training_row_has(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,0\n")
    (tmp_path / "test.csv").write_text("text,label\na,1\nb,2\n")
    data = Data(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), label="label")
    with pytest.raises(InputError, match="the label 2 in column 'label'"):
        load_tables(data, "sequence-classification", 0)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(recipe: Recipe) -> None:
    with pytest.raises(InputError, match="could not be loaded from the hub"):
        load_tables(Data(train="nobody/nothing", label="label"), "sequence-classification", 0)
    settings = recipe.model.model_copy(update={"base": "nobody/nothing"})
    with pytest.raises(InputError, match="'nobody/nothing' could not be loaded"):
        Workbench(settings, "sequence-classification", ("0", "1"), 0)


@pytest.mark.parametrize(
    ("split", "rows"), [("train", [0, 1, 2, 3]), ("train[1:3]", [1, 2]), ("x[:1]", [0]), ("x[2:]", [2, 3])]
)
def test_rows_of_a_file_by_number(split: str, rows: list[int], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(4)))
    data = Data(train=str(path), train_split=split, test=str(path), test_split="test[3:4]")
    tables = load_tables(data, "causal-lm", 0)
    assert list(tables.train["text"]) == [f"row {i}" for i in rows]
    assert list(tables.test["text"]) == ["row 3"]


@pytest.mark.parametrize(
    ("split", "words"),
    [("train[10%:]", "rows are named by number"), ("train[1]", "cannot be read"), ("train[4:9]", "the file has 4")],
)
def test_a_split_of_a_file_that_cannot_be(split: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text\n" + "".join(f"row {i}\n" for i in range(4)))
    with pytest.raises(InputError) as caught:
        load_tables(Data(train=str(path), train_split=split), "causal-lm", 0)
    assert words in str(caught.value)
    assert "x.csv" in str(caught.value)
