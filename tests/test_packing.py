"""`train.packing`: rows laid end to end are the same rows to the model, to the loss, and to the weights of clients."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from florana.errors import InputError, RecipeError
from florana.recipe.load import check
from florana.recipe.schema import Model
from florana.runs.dry_run import plan
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.train.data.packing import packed
from florana.train.data.tokenize import Example, collate, encode_language
from florana.train.model import Workbench
from florana.train.probe import require_apart
from tests.conftest import ROOT
from tests.families import FAMILIES, LANGUAGE

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TEXTS = [("a film",), ("good",), ("a quick story about a dog",), ("the end of it",), ("no",)]


def row(size: int, number: int) -> Example:
    return Example((number,) * size, (), (-100,) + (number,) * (size - 1))


@given(st.lists(st.integers(2, 40), max_size=30), st.integers(8, 40))
def test_every_row_is_in_one_bin_as_it_was_and_bins_are_full(sizes: list[int], length: int) -> None:
    rows = [row(size, number) for number, size in enumerate(sizes)]
    bins = packed(rows, length)
    found = []
    for one in bins:
        ends = [*one.starts[1:], len(one.ids)]
        inside = [
            Example(one.ids[start:end], (), tuple(int(label) for label in one.labels[start:end]))
            for start, end in zip(one.starts, ends, strict=True)
        ]
        assert len(one.ids) <= length or len(inside) == 1
        found += inside
    assert sorted(found, key=lambda one: one.ids[0]) == rows
    fitting = sorted(len(one.ids) for one in bins if len(one.ids) <= length)
    assert all(a + b > length for a, b in itertools.pairwise(fitting)), "two bins would fit in one"
    assert packed(rows, length) == bins


@pytest.fixture(scope="module")
def bench(tiny_llama: Path) -> Workbench:
    made = Workbench(Model(base=str(tiny_llama), target_modules=["q_proj", "v_proj"], rank=2), "causal-lm", (), 0)
    for pair in made.factors.values():
        torch.nn.init.normal_(pair.B, std=0.5, generator=torch.Generator().manual_seed(1))
    return made


def test_a_batch_of_bins_has_the_loss_and_the_gradient_of_its_rows(bench: Workbench) -> None:
    """Each row alone in float64 arithmetic of the means, against bins of unequal length with padding behind them."""
    rows = encode_language(TEXTS, bench.tokenizer, 64)
    bins = packed(rows, 40)
    assert 1 < len(bins) < len(rows)
    assert len({len(one.ids) for one in bins}) > 1, "there is padding"
    batch = collate(bins, bench.tokenizer.pad_token_id, bench.device)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    bench.model.eval()
    bench.model.zero_grad(set_to_none=True)
    packed_loss = bench.forward(batch).loss
    packed_loss.backward()
    gradients = [parameter.grad.clone() for parameter in bench.trainable if parameter.grad is not None]
    bench.model.zero_grad(set_to_none=True)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in rows:
        targets = sum(label != -100 for label in one.labels[1:])
        loss = bench.forward(bench.batch([one])).loss
        (loss * targets).backward()
        total, count = total + loss.double().detach() * targets, count + targets
    assert float(packed_loss.detach()) == pytest.approx(float(total / count), rel=1e-5)
    alone = [parameter.grad / count for parameter in bench.trainable if parameter.grad is not None]
    bench.model.zero_grad(set_to_none=True)
    assert len(gradients) == len(alone) > 0
    for one, other in zip(gradients, alone, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_a_model_that_cannot_tell_rows_apart_is_refused(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    require_apart(bench, "tiny")
    known = bench._inputs
    monkeypatch.setattr(bench, "_inputs", known - {"position_ids"})
    with pytest.raises(InputError, match=r"train\.packing does not go with the model 'tiny'"):
        require_apart(bench, "tiny")
    monkeypatch.setattr(bench, "_inputs", known - {"use_cache"})
    with pytest.raises(InputError, match="would see one another"):
        require_apart(bench, "tiny")


def test_the_families_that_are_refused_are_those_that_the_docs_name(tmp_path: Path) -> None:
    refused = []
    for name, family in FAMILIES.items():
        if LANGUAGE in family.tasks:
            base = str(family.write(tmp_path / name))
            made = Workbench(Model(base=base, rank=2, target_modules=family.targets), LANGUAGE, (), 0)
            try:
                require_apart(made, name)
            except InputError:
                refused.append(name)
    line = re.search(r"`train.packing` works with .* but ([^.]*)\.", (ROOT / "docs" / "models.md").read_text())
    assert line is not None
    assert re.split(r", | and ", line[1]) == refused


@pytest.fixture
def table(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    lines = [json.dumps({"text": "a" * (3 + number % 7)}) for number in range(48)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "task": "causal-lm",
        "model": {"base": str(tiny_llama), "target_modules": ["q_proj", "v_proj"], "rank": 2},
        "data": {"train": str(tmp_path / "rows.jsonl"), "text": "text", "max_length": 32},
        "partition": {"kind": "linear", "clients": 2},
        "train": {"epochs": 1, "batch_size": 2, "packing": True},
        "federation": {"rounds": 2},
        "strategy": {"name": "best-rank"},
    }


def test_a_run_packs_its_rows_and_weighs_by_rows(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = check(table, "t")
    setup = prepare(recipe)
    rows = {client: len(data.train) for client, data in setup.clients.items()}
    bins = {client: len(data.bins) for client, data in setup.clients.items()}
    assert all(2 * bins[client] <= rows[client] for client in rows)
    promised = plan(recipe, setup)
    assert promised.clients == rows
    assert promised.steps == sum(-(-count // 2) for count in bins.values()) / 2
    steps: list[str] = []
    whole = execute(recipe, tmp_path / "whole", setup=setup, step=steps.append)
    assert len(steps) == 2 * sum(-(-count // 2) for count in bins.values())
    assert whole.records[0].examples == rows
    execute(recipe, tmp_path / "cut", until=1)
    execute(recipe, tmp_path / "cut", resume=True)
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_packing_is_of_language_alone(recipe_table: dict[str, Any]) -> None:
    recipe_table["train"]["packing"] = True
    with pytest.raises(RecipeError, match=r"train\.packing is of task = 'causal-lm'"):
        check(recipe_table, "t")
