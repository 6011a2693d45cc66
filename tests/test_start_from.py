"""`model.adapter`: a run that starts from an adapter there is; adapters by hub name wherever a folder is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from florana import read_adapter, write_adapter
from florana.adapters.hub import adapter_folder
from florana.adapters.inspect import inspect
from florana.adapters.merge import merge
from florana.errors import InputError, RecipeError
from florana.lora.factors import Adapter, LoraFactors
from florana.recipe.load import check, read_recipe
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.strategy import STRATEGIES
from tests.cases import dense
from tests.program import florana

OWN = ("frlora", "fed-sb", "fedsvd", "ravan")
"""Those that begin with factors of their own."""


@pytest.fixture
def first(recipe_table: dict[str, Any], tmp_path: Path) -> Path:
    """A run of one round, whose adapter is no usual start: B is not zero."""
    recipe_table["federation"] = {"rounds": 1}
    execute(check(recipe_table, "t"), tmp_path / "first")
    return tmp_path / "first"


def continued(table: dict[str, Any], adapter: Path | str, out: Path, **strategy: Any) -> Path:
    own = json.loads(json.dumps(table))
    own["model"]["adapter"] = str(adapter)
    own["strategy"] = strategy or own["strategy"]
    own["seed"] = 99
    execute(check(own, "t"), out)
    return out


def test_the_start_is_the_adapter_with_its_head_and_its_score(
    first: Path, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe_table["model"]["adapter"] = str(first)
    setup = prepare(check(recipe_table, "t"))
    stored, _ = read_adapter(first / "adapter")
    for name, tensor in stored.tensors().items():
        assert torch.equal(setup.start.tensors()[name], tensor), name
    assert len(stored.extra) > 0
    recipe_table["model"].pop("adapter")
    out = continued(recipe_table, first / "adapter", tmp_path / "next")
    began = json.loads((out / "setup.json").read_text())["start"]
    ended = json.loads((first / "rounds.jsonl").read_text().splitlines()[-1])["eval"]["global"]
    assert began.keys() == ended.keys(), "the test rows are another seed's: their figures are not compared"
    assert (out / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "local-only"])
def test_every_method_starts_there_or_says_that_it_cannot(
    name: str, first: Path, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """After a round of steps too small to see, the model is the one that was given."""
    recipe_table["train"] |= {"learning_rate": 1e-12}
    options = {"ravan": {"heads": 2, "size": 4}, "florist": {"energy": 1.0}}.get(name, {})
    stored, _ = read_adapter(first / "adapter")
    if name in OWN:
        with pytest.raises(RecipeError, match=r"cannot start from model\.adapter"):
            continued(recipe_table, first, tmp_path / "next", name=name, **options)
        return
    out = continued(recipe_table, first, tmp_path / "next", name=name, **options)
    found, _ = read_adapter(out / "adapter")
    for module in stored.modules:
        assert np.allclose(dense(stored, module), dense(found, module), atol=1e-5), module


def test_what_does_not_fit_is_named(first: Path, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    stored, card = read_adapter(first / "adapter")
    some = dict(list(stored.modules.items())[:-1])
    wide = {
        n: LoraFactors(torch.cat([p.B, p.B], 1), torch.cat([p.A, p.A]), p.scaling) for n, p in stored.modules.items()
    }
    more = {n: LoraFactors(p.B, p.A, 7.0) for n, p in stored.modules.items()}
    head = {name: torch.cat([tensor, tensor]) for name, tensor in stored.extra.items()}
    for adapter, why in (
        (Adapter(some, stored.extra), "adapts other modules than the recipe"),
        (Adapter(wide, stored.extra), r"model.rank = 4 and model.alpha = 12"),
        (Adapter(more, stored.extra), r"scaling 7 .*, the recipe says rank 2 and scaling 3"),
        (Adapter(stored.modules, head), "trained for other classes"),
    ):
        shutil.rmtree(tmp_path / "odd", ignore_errors=True)
        write_adapter(tmp_path / "odd", adapter, card)
        with pytest.raises(InputError, match=why):
            continued(recipe_table, tmp_path / "odd", tmp_path / "x")
        assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="does not exist"):
        continued(recipe_table, tmp_path / "none", tmp_path / "x")


def test_combinations_that_cannot_hold_are_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    for change, why in (
        ({"partition": {"kind": "sites"}, "data": recipe_table["data"] | {"labels": ["0", "1"]}}, "'sites'"),
        ({"model": recipe_table["model"] | {"variant": "dora"}}, "'dora'"),
    ):
        table = recipe_table | change
        table["model"] = table["model"] | {"adapter": "somewhere"}
        table["federation"] = {"rounds": 1}
        with pytest.raises(RecipeError, match=rf"model.adapter does not go with .*{why}"):
            check(table, "t")


def test_paths_count_from_the_recipes_folder(first: Path, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    import tomli_w

    recipe_table["model"]["adapter"] = "first"
    (tmp_path / "r.toml").write_text(tomli_w.dumps(recipe_table))
    assert read_recipe(tmp_path / "r.toml").model.adapter == str(first)


def test_hub_names_are_looked_up_where_no_folder_is(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is asked for an adapter's files alone; a folder of that name comes first."""
    asked: list[tuple[str, list[str]]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(first / "adapter")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert inspect(["owner/name"]).sheets[0].modules == inspect([first / "adapter"]).sheets[0].modules
    merge(["owner/name", first / "adapter"], tmp_path / "merged")
    assert {name for name, _ in asked} == {"owner/name"}
    assert not any("bin" in pattern or pattern == "*" for _, patterns in asked for pattern in patterns)
    shutil.copytree(first / "adapter", tmp_path / "owner" / "name")
    count = len(asked)
    assert adapter_folder(Path("owner/name")) == Path("owner/name")
    assert len(asked) == count
    for name in ("plain", "a/b/c", "/a/b", "../a", "a/.."):
        assert adapter_folder(Path(name)) == Path(name)


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    for verb in (["inspect", "owner/name"], ["merge", "owner/name", "owner/other", "--out", "x"],
                 ["predict", "owner/name", "a text"]):  # fmt: skip
        done = florana(*verb, cwd=tmp_path)
        assert done.returncode == 3, done.stderr
        assert "could not be loaded from the hub" in done.stderr
        assert "Traceback" not in done.stderr
