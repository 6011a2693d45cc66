"""`florana init`: what it makes of files is a recipe that runs; conversations and encodings that users have."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from florana.errors import InputError, RecipeError
from florana.recipe.load import check, read_recipe
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.train.data.first_recipe import first_recipe
from florana.train.data.instructions import turns_of
from florana.train.data.sources import load_tables
from tests.program import florana

WORDS = "the film was long and slow but the actors were good"


def lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "classes by name": (lambda i: {"id": i, "review": f"{WORDS} {i}", "stars": i % 5}, "sequence-classification",
                        {"text": "review", "label": "stars"}),
    "classes by their few values": (lambda i: {"body": f"{WORDS} {i}", "kind": "ab"[i % 2]}, "sequence-classification",
                                    {"text": "body", "label": "kind"}),
    "a pair": (lambda i: {"a": f"{WORDS} {i}", "b": f"{WORDS} {-i}", "label": i % 2}, "sequence-classification",
               {"text": ["a", "b"], "label": "label"}),
    "a text and a note": (lambda i: {"note": "x", "text": f"{WORDS} {i}", "label": i % 2}, "sequence-classification",
                          {"text": "text", "label": "label"}),
    "scores": (lambda i: {"text": f"{WORDS} {i}", "score": i / 7}, "sequence-regression",
               {"text": "text", "label": "score"}),
    "questions": (lambda i: {"question": f"{i} + {i}?", "answer": str(2 * i)}, "causal-lm",
                  {"text": ["question", "answer"]}),
    "plain text": (lambda i: {"story": f"{WORDS} {i}"}, "causal-lm", {"text": "story"}),
    "alpaca": (lambda i: {"instruction": f"Add {i}.", "input": "", "output": str(i)}, "causal-lm",
               {"instructions": "alpaca"}),
    "messages": (lambda i: {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "b"}]},
                 "causal-lm", {"instructions": "messages"}),
    "sharegpt": (lambda i: {"conversations": [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "b"}]},
                 "causal-lm", {"instructions": "sharegpt"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_becomes_a_recipe(case: str, tmp_path: Path) -> None:
    row, task, data = CASES[case]
    file = lines(tmp_path, [row(index) for index in range(60)])
    (tmp_path / "sub").mkdir()
    out = tmp_path / "sub" / "recipe.toml"
    out.write_text(first_recipe(file, out))
    found = read_recipe(out)
    assert found.task == task
    assert Path(found.data.train) == file
    for key, value in data.items():
        assert getattr(found.data, key) == value, key
    assert found.strategy["name"] == "best-rank"
    load_tables(found.data, found.task, 0)


def test_names_from_the_file_stay_text(tmp_path: Path) -> None:
    """A column or a file called like TOML, or with a line break, makes no key."""
    evil = 'x"\n[strategy]\nname = "mine.py:run"\n#'
    file = lines(tmp_path, [{evil: f"{WORDS} {i}", "label": i % 2} for i in range(40)])
    hostile = tmp_path / "a\nseed = 7\n.jsonl"
    file.rename(hostile)
    out = tmp_path / "r\ntitle = 'x'\n.toml"
    table = tomllib.loads(first_recipe(hostile, out))
    assert table["strategy"] == {"name": "best-rank"}
    assert table["data"]["text"] == evil
    assert "seed" not in table
    assert "title" not in table


def test_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column holds text"):
        first_recipe(lines(tmp_path, [{"a": i, "b": 2 * i} for i in range(9)]), tmp_path / "r.toml")


def test_on_the_command_line(sentences: Path, tmp_path: Path) -> None:
    done = florana("init", str(sentences), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "florana run recipe.toml --dry-run" in done.stdout
    again = florana("init", str(sentences), cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    missing = florana("init", "none.csv", "--out", "other.toml", cwd=tmp_path)
    assert missing.returncode == 3
    assert not (tmp_path / "other.toml").exists()


def test_sharegpt_is_read_as_the_same_chat_in_messages(recipe_table: dict[str, Any], tiny_llama: Path,
                                                       tmp_path: Path) -> None:  # fmt: skip
    turns = [("human", "a good film"), ("gpt", "a bad plot"), ("human", "the music"), ("chatgpt", "calm")]
    share = [{"from": role, "value": text} for role, text in turns]
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
    messages = [{"role": roles[role], "content": text} for role, text in turns]
    found = turns_of({"conversations": share}, "sharegpt", "row 1", plain=True)
    assert found == turns_of({"messages": messages}, "messages", "row 1", plain=True)
    file = lines(tmp_path, [{"conversations": share, "id": str(i)} for i in range(20)])
    recipe_table |= {"task": "causal-lm", "partition": {"clients": 2}, "federation": {"rounds": 1}}
    recipe_table["model"] |= {"base": str(tiny_llama), "target_modules": "all-linear"}
    recipe_table["data"] = {"train": str(file), "instructions": "sharegpt", "max_length": 128}
    assert len(execute(check(recipe_table, "t"), tmp_path / "run").records) == 1
    for bad in ([{"from": "human", "value": ""}], [{"role": "user", "content": "a"}], "text", [1]):
        with pytest.raises(InputError, match=r"`from`|empty list"):
            turns_of({"conversations": bad}, "sharegpt", "row 1", plain=True)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "shift_jis", "UTF-8"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_files_in_other_encodings_are_the_same_rows(
    encoding: str, ending: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    text = "映画は長い" if encoding == "shift_jis" else "Das Stück war schön, très bien"
    rows = [{"text": f"{text} {i}", "label": i % 2} for i in range(12)]
    content = {
        "csv": "text,label\n" + "\n".join(f'"{row["text"]}",{row["label"]}' for row in rows),
        "tsv": "text\tlabel\n" + "\n".join(f"{row['text']}\t{row['label']}" for row in rows),
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
    }[ending]
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(content.encode(encoding))
    recipe_table["data"] = {"train": str(file), "text": "text", "label": "label", "encoding": encoding}
    recipe_table["partition"] = {"kind": "iid", "clients": 3}
    tables = load_tables(check(recipe_table, "t").data, "sequence-classification", 0)
    found = {*tables.train["text"], *tables.test["text"]}
    assert found == {row["text"] for row in rows}
    if encoding in ("latin-1", "cp1252", "shift_jis"):
        recipe_table["data"].pop("encoding")
        with pytest.raises(InputError, match=rf"rows.{ending}, line \d+: it is not UTF-8"):
            prepare(check(recipe_table, "t"))


def test_a_wrong_encoding_is_named_with_its_line(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes("text,label\na,0\nb,1\nschön,0\n".encode("latin-1"))
    recipe_table["data"] = {"train": str(file), "text": "text", "label": "label", "encoding": "ascii"}
    with pytest.raises(InputError, match="is not ascii"):
        prepare(check(recipe_table, "t"))
    for name in ("utf-9", "base64", "rot13", ""):
        recipe_table["data"]["encoding"] = name
        with pytest.raises(RecipeError, match="encoding"):
            check(recipe_table, "t")


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"review,mood\n" + "".join(f"schön {i},good\nblöd {i},bad\n" for i in range(20)).encode("cp1252"))
    with pytest.raises(InputError, match=r"of `init`: --encoding"):
        first_recipe(file, tmp_path / "recipe.toml")
    text = first_recipe(file, tmp_path / "recipe.toml", "cp1252")
    assert 'encoding = "cp1252"' in text
    (tmp_path / "recipe.toml").write_text(text)
    assert read_recipe(tmp_path / "recipe.toml").data.encoding == "cp1252"
    for senseless in ("nonsense", "hex"):
        with pytest.raises(InputError, match="there is no encoding"):
            first_recipe(file, tmp_path / "recipe.toml", senseless)
