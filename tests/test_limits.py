"""Rows and models that do not fit each other are refused before anything is trained, with the setting to change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from florana.errors import FloranaError, InputError
from florana.federation.local_engine import LocalEngine
from florana.federation.messages import Brief, Failure, Reply
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.prepared import prepare
from tests.conftest import WORDS
from tests.families import CLASSES, FAMILIES, Family, Task


def rows(path: Path, longest: int) -> Path:
    texts = [" ".join(WORDS[k % 20] for k in range(n)) for n in (3, longest, 4, 5, 3, 4)]
    path.write_text("".join(json.dumps({"text": t, "label": "ab"[i % 2]}) + "\n" for i, t in enumerate(texts)))
    return path


def asked(family: Family, task: Task, base: Path, data: Path, max_length: int) -> Recipe:
    return check(
        {
            "task": task,
            "model": {"base": str(base), "target_modules": family.targets, "rank": 2, "alpha": 6.0},
            "data": {"train": str(data), "test": str(data), "text": "text", "label": "label", "max_length": max_length},
            "partition": {"kind": "iid", "clients": 2},
            "train": {"steps": 3, "batch_size": 4},
            "strategy": {"name": "fedit"},
            "evaluate": {"personal": "never"},
        },
        "test",
    )


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("BERT", 32),
        ("RoBERTa", 30),
        ("ELECTRA", 32),
        ("MPNet", 30),
        ("GPT-2", 32),
        ("OPT", 32),
        ("DistilBERT", 32),
        ("BART", 32),
    ],
)
def test_a_row_longer_than_the_positions_is_refused(name: str, room: int, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = family.write(tmp_path / "base")
    with pytest.raises(InputError, match=rf"row 2: it is .* tokens long(.|\n)*data.max_length = {room} or less"):
        prepare(asked(family, CLASSES, base, rows(tmp_path / "rows.jsonl", 60), 64))
    fitting = prepare(asked(family, CLASSES, base, tmp_path / "rows.jsonl", room))
    assert max(len(example.ids) for example in fitting.common) == room
    fitting.bench.model.eval()
    fitting.bench.forward(fitting.bench.batch(fitting.common))  # and the last of them is really there


@pytest.mark.parametrize("name", ["Llama", "BLOOM", "T5", "DeBERTa-v2", "Falcon"])
def test_positions_that_are_computed_have_no_end(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if name == "DeBERTa-v2":  # its relative positions alone
        family = dataclasses.replace(family, settings={**family.settings, "position_biased_input": False})
    base = family.write(tmp_path / "base")
    setup = prepare(asked(family, CLASSES, base, rows(tmp_path / "rows.jsonl", 60), 64))
    assert bool(setup.bench.forward(setup.bench.batch(setup.common)).loss.isfinite())


def test_a_limit_that_no_table_shows_is_found_by_reading_the_row(tmp_path: Path) -> None:
    family = FAMILIES["GPT-J"]  # a buffer of sines
    base = family.write(tmp_path / "base")
    with pytest.raises(InputError, match="32 positions, and fails on it"):
        prepare(asked(family, CLASSES, base, rows(tmp_path / "rows.jsonl", 60), 64))


def test_a_token_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["BERT"]
    base = family.write(tmp_path / "base")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"extra{k}" for k in range(20)])
    tokenizer.save_pretrained(base)
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"text": text, "label": label}) + "\n" for text, label in (("the film", "a"), ("extra19", "b"))
        )
    )
    with pytest.raises(InputError, match=r"row 2: it has the token id 44, but the model's embedding has 32 rows"):
        prepare(asked(family, CLASSES, base, data, 16))


def brief(round_: int) -> Brief:
    return Brief(
        round=round_, client="c", seed=0, payload=b"", evaluate=False, trains=[], returns=[], scalings={}, blocks=None,
        pruning=None, uplink="float32", feedback=[],
    )  # fmt: skip


def test_an_unexpected_exception_ends_the_first_round_and_is_a_refusal_later() -> None:
    def breaks(brief: Brief, memory: Any) -> tuple[Reply, Any]:
        raise IndexError("index out of range in self")

    with pytest.raises(IndexError) as caught:
        list(LocalEngine(breaks).fit([brief(1)]))
    assert "client 'c'" in caught.value.__notes__[0]
    assert list(LocalEngine(breaks).fit([brief(2)])) == [Failure("c", "IndexError: index out of range in self")]

    def diverges(brief: Brief, memory: Any) -> tuple[Reply, Any]:
        raise FloranaError("the training loss became nan")

    assert list(LocalEngine(diverges).fit([brief(1)])) == [Failure("c", "the training loss became nan")]
