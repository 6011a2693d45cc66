"""Every family of the table: the adapter that a run leaves, loaded by PEFT alone, has the figures of the run."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from florana.errors import InputError
from florana.recipe_file import check
from florana.run import execute, prepare
from florana.train.shapes import shapes_of
from tests.conftest import ROOT, WORDS
from tests.families import CLASSES, FAMILIES, LANGUAGE, Family, Task

CASES = [(name, task) for name, family in FAMILIES.items() for task in family.tasks]
ROWS = [(" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(2 + i % 5)), i % 3) for i in range(24)]
LABELS = ["a", "b", "c"]


def recipe(family: Family, task: Task, base: Path, rows: Path) -> Any:
    return check(
        {
            "task": task,
            "model": {"base": str(base), "target_modules": family.targets, "rank": 2, "alpha": 6.0},
            "data": {"train": str(rows), "test": str(rows), "text": "text", "max_length": 12}
            | ({"label": "label"} if task == CLASSES else {}),
            "partition": {"kind": "iid", "clients": 2},
            "train": {"steps": 3, "batch_size": 4, "learning_rate": 3e-2},
            "federation": {"rounds": 1},
            "strategy": {"name": "fedit"},
            "evaluate": {"personal": "never"},
        },
        "test",
    )


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_adapter_on_a_fresh_base_gives_the_figures_of_the_run(name: str, task: Task, tmp_path: Path) -> None:
    told, (loss, accuracy) = figures(FAMILIES[name], task, tmp_path)
    assert loss == pytest.approx(told["loss"], rel=1e-4)
    assert accuracy == pytest.approx(told.get("accuracy", math.nan), abs=1e-9, nan_ok=True)


def figures(family: Family, task: Task, folder: Path) -> tuple[Mapping[str, float], tuple[float, float]]:
    """(what one round's rounds.jsonl says of the global model, loss and accuracy of its adapter on a fresh base)."""
    base = family.write(folder / "base")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in ROWS))
    record = execute(recipe(family, task, base, rows), folder / "run").records[-1]
    return record.eval["global"], fresh(base, folder / "run" / "adapter", task)


def fresh(base: Path, adapter: Path, task: Task) -> tuple[float, float]:
    """(loss, accuracy) of the folder on a base whose missing layers are drawn from another seed, row by row."""
    torch.manual_seed(20261126)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if task == CLASSES:
            loaded = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
        else:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(base)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        if loaded.config.pad_token_id is None:
            loaded.config.pad_token_id = tokenizer.eos_token_id
        model = PeftModel.from_pretrained(loaded, adapter).eval()
        return classes(model, tokenizer) if task == CLASSES else language(model, tokenizer)


@torch.inference_mode()
def classes(model: Any, tokenizer: Any) -> tuple[float, float]:
    losses, right = [], 0
    for text, label in ROWS:
        batch = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        logits = model(**batch).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
        right += int(logits.argmax()) == label
    return sum(losses) / len(losses), right / len(ROWS)


@torch.inference_mode()
def language(model: Any, tokenizer: Any) -> tuple[float, float]:
    total, count = 0.0, 0
    for text, _ in ROWS:
        ids: Sequence[int] = [
            *([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []),
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ][:12]
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    return total / count, math.nan


def test_the_page_lists_the_families() -> None:
    """docs/models.md is written by scripts/family_table.py; a family that comes or goes changes it."""
    page = (ROOT / "docs" / "models.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`" in line]
    wanted = [(name, task) for name, family in FAMILIES.items() for task in family.tasks]
    assert [(row.split("|")[1].strip(), row.split("|")[3].strip().strip("`")) for row in rows] == wanted


@pytest.mark.parametrize(
    ("name", "task", "targets", "parts"),
    [
        ("BERT", "causal-lm", "all-linear", ["encoders", "is_decoder"]),
        ("ELECTRA", "causal-lm", "all-linear", ["lacks", "causal-lm trains no layer whole"]),
        ("Qwen3-MoE", "causal-lm", "all-linear", ["mixture of experts", "experts.gate_up_proj", '"q_proj"']),
        ("Mixtral", "sequence-classification", "all-linear", ["mixture of experts", "adapts no experts"]),
        ("Mamba", "causal-lm", "all-linear", ["out_proj", '"in_proj"']),
        ("Llama", "causal-lm", ["q_prj"], ["q_proj"]),
    ],
)
def test_what_could_not_come_back_is_refused_by_name(
    name: str, task: Task, targets: str | list[str], parts: list[str], tmp_path: Path
) -> None:
    family = dataclasses.replace(FAMILIES[name], targets=targets)
    base, rows = family.write(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in ROWS))
    with pytest.raises(InputError) as caught:
        prepare(recipe(family, task, base, rows))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_batch_holds_what_the_tokenizer_made_and_nothing_else(tmp_path: Path) -> None:
    for name, wanted in (("GPT-2", set()), ("BERT", {"token_type_ids"})):
        family = FAMILIES[name]
        base, rows = family.write(tmp_path / name), tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in ROWS))
        setup = prepare(recipe(family, CLASSES, base, rows))
        batch = setup.bench.batch(setup.common[:3])
        assert set(batch) - {"input_ids", "attention_mask", "labels"} == wanted


def test_a_plan_counts_the_modules_that_a_run_has(tmp_path: Path) -> None:
    for name, task in (("Llama", LANGUAGE), ("BERT", CLASSES), ("T5", CLASSES)):
        family = FAMILIES[name]
        base, rows = family.write(tmp_path / name), tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in ROWS))
        setup = prepare(recipe(family, task, base, rows))
        shapes = sorted(pair.shape for pair in setup.start.modules.values())
        assert sorted(shapes_of(str(base), ("all-linear",), task).modules.values()) == shapes
