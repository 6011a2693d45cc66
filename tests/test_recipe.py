"""Recipes: closed to misspelt keys, combinations checked, overrides parsed, resolved text runs again."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from florana.errors import RecipeError
from florana.recipe.load import check, differences, read_recipe, resolve
from florana.study.named_methods import method_of
from tests.conftest import ROOT

BASE: dict[str, Any] = {
    "task": "sequence-classification",
    "model": {"base": "some/model"},
    "data": {"train": "train.csv", "label": "label"},
    "partition": {"kind": "dirichlet", "clients": 4},
    "train": {"steps": 2},
    "strategy": {"name": "fedit"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    table = copy.deepcopy(BASE)
    *folders, last = path.split(".")
    inner = table
    for name in folders:
        inner = inner.setdefault(name, {})
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return table


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("model.rnak", "rank"),
        ("model.target_module", "target_modules"),
        ("train.learning_rat", "learning_rate"),
        ("train.batchsize", "batch_size"),
        ("federation.round", "rounds"),
        ("federation.client_per_round", "clients_per_round"),
        ("partition.alhpa", "alpha"),
        ("evaluate.evry", "every"),
        ("sede", "seed"),
        ("strategey", "strategy"),
        ("data.lable", "label"),
    ],
)
def test_a_misspelt_key_names_the_nearest_right_one(path: str, nearest: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(changed(path, 1), "r.toml")
    assert f"unknown key '{path}': did you mean '{nearest}'?" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.rank", 0, "greater than or equal to 1"),
        ("model.rank", "eight", "valid integer"),
        ("model.alpha", -1, "greater than 0"),
        ("task", "regression", "'sequence-classification', 'sequence-regression' or 'causal-lm'"),
        ("train.epochs", 1, "give either steps or epochs"),
        ("train.steps", None, "give either steps or epochs"),
        ("data.label", None, "data.label is missing"),
        ("partition.clients", None, "partition.clients is missing"),
        ("federation.clients_per_round", 5, "clients_per_round is 5, but there are 4 clients"),
        ("federation.min_clients", 5, "min_clients is 5, but 4 are asked"),
        ("model.quantization", "4bit", "needs model.device = 'cuda'"),
        ("strategy.name", "flora-an", "did you mean 'flora-na'?"),
        ("strategy.name", None, "'strategy.name' is missing"),
        ("strategy.scope", "module", "'fedit' has no options"),
        ("model.client_ranks", [2, 16], "model.client_ranks has 16, above model.rank = 8"),
        ("model.client_ranks", [0], "greater than or equal to 1"),
        ("model.client_ranks", [], "at least 1 item"),
        ("model.client_ranks", [2, 4], "does not go with the strategy 'fedit'"),
        ("data.train", None, "'data.train' is missing"),
    ],
)
def test_wrong_values_and_combinations_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(changed(path, value), "r.toml")
    assert message in str(caught.value)
    assert "r.toml" in str(caught.value)


def test_strategy_options_are_checked_against_the_strategy() -> None:
    table = changed("strategy", {"name": "flora-na", "scope": "model", "combine": "updates"})
    assert check(table, "r").build_strategy().name == "flora-na"
    with pytest.raises(RecipeError, match="did you mean 'solver'"):
        check(changed("strategy", {"name": "flora-na", "solvr": "als"}), "r")
    assert check(changed("strategy", {"name": "fedex-lora", "residual_rank": 4}), "r").build_strategy()
    for name, wrong in (("fedex-lora", {"residual_rank": "four"}), ("lora-fair", {"penalty": "x"})):
        with pytest.raises(RecipeError, match="strategy"):
            check(changed("strategy", {"name": name, **wrong}), "r")
    with pytest.raises(RecipeError, match="not at least 1"):
        check(changed("strategy", {"name": "fedex-lora", "residual_rank": 0}), "r")
    assert check(changed("strategy", {"name": "lora-fair", "penalty": 1}), "r")
    for options, message in (
        ({"name": "best-rank", "factorization": "aligned", "carry_rank": 8, "broadcast_error": 0.1}, None),
        ({"name": "best-rank", "factorization": "straight"}, "one of 'balanced', 'orthonormal', 'aligned'"),
        ({"name": "best-rank", "broadcast_rank": 9, "broadcast_bytes": 9}, "exclude one another"),
        ({"name": "ravan", "heads": 0}, "strategy.heads is 0"),
        ({"name": "ravan", "heads_per_client": 0}, "strategy.heads_per_client is 0, not at least 1"),
        ({"name": "ravan", "heads_per_client": 5}, "strategy.heads_per_client is 5, but there are 4 heads"),
        ({"name": "lora-fair", "penalty": -0.5}, "strategy.penalty is -0.5, not a finite number"),
        ({"name": "hetlora", "gamma": 0.0}, "strategy.gamma is 0.0, not above 0"),
        ({"name": "hetlora", "gamma": 1.5}, "strategy.gamma is 1.5, not above 0"),
        ({"name": "hetlora", "penalty": -1.0}, "strategy.penalty is -1.0, not a finite number"),
        ({"name": "fed-sb", "begin": "pooled"}, "one of 'principal', 'gradient', 'random'"),
        ({"name": "florist", "energy": 1.5}, "strategy.energy is 1.5"),
    ):
        if message is None:
            assert check(changed("strategy", options), "r")
            continue
        with pytest.raises(RecipeError, match=message):
            check(changed("strategy", options), "r")


def test_mixed_ranks_are_refused_with_the_methods_reason_and_pass_where_they_can_work() -> None:
    table = changed("model.client_ranks", [2, 4])
    for name, reason in (("fedsvd", "one A"), ("fed-sb", "fixed factors"), ("fedex-lora", "entry by entry")):
        table["strategy"] = {"name": name}
        with pytest.raises(RecipeError, match=reason):
            check(table, "r")
    table["strategy"] = {"name": "flora-na", "combine": "updates"}
    with pytest.raises(RecipeError, match="combine = factors"):
        check(table, "r")
    for name in ("best-rank", "oracle", "flora-na", "flexlora", "florist", "flora", "hetlora", "ffa-lora", "ravan"):
        table["strategy"] = {"name": name}
        assert check(table, "r").model.client_ranks == [2, 4]


def test_starting_from_the_base_weights_excludes_a_quantised_base() -> None:
    table = changed("model.quantization", "4bit")
    table["model"]["device"] = "cuda"
    for name in ("frlora", "fed-sb"):
        table["strategy"] = {"name": name}
        with pytest.raises(RecipeError, match=f"'{name}' does not go with model.quantization"):
            check(table, "r")
    table["strategy"] = {"name": "fed-sb", "begin": "random"}
    assert check(table, "r")
    with pytest.raises(RecipeError, match="one of 'als', 'adamw'"):
        check(changed("strategy", {"name": "flora-na", "solver": "sgd"}), "r")


def test_personal_heads_make_no_sense_for_language_models() -> None:
    table = changed("task", "causal-lm")
    table["model"]["head"] = "personal"
    table["partition"] = {"kind": "iid", "clients": 2}
    with pytest.raises(RecipeError, match="no tensor is trained whole"):
        check(table, "r")


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,1\n")
    recipe = resolve(check(BASE, "r"), tmp_path)
    assert recipe.data.train == str(tmp_path / "train.csv")
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert read_recipe(tmp_path / "again.toml") == recipe


def test_overrides_are_toml_values_under_dotted_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(check(BASE, "r").to_toml())
    recipe = read_recipe(path, ["train.learning_rate=1e-4", "strategy.name=best-rank", 'model.target_modules=["q"]'])
    assert recipe.train.learning_rate == 1e-4
    assert recipe.strategy["name"] == "best-rank"
    assert recipe.model.target_modules == ["q"]
    with pytest.raises(RecipeError, match="did you mean 'rounds'"):
        read_recipe(path, ["federation.ronds=3"])
    with pytest.raises(RecipeError, match="not key=value"):
        read_recipe(path, ["rounds"])
    with pytest.raises(RecipeError, match="is a value, not a table"):
        read_recipe(path, ["seed.x=3"])


@pytest.mark.parametrize("content", [b"not = = toml", b"\xff\xfe", b""])
def test_a_file_that_is_no_recipe(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert "r.toml" in str(caught.value)
    with pytest.raises(RecipeError, match="there is no recipe"):
        read_recipe(tmp_path / "none.toml")


def test_differences_name_the_key_and_both_values() -> None:
    assert differences(check(BASE, "r"), check(changed("train.steps", 3), "r")) == ["train.steps: 2 -> 3"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_this_repository_are_valid(path: Path) -> None:
    assert read_recipe(path).title
    assert tomllib.loads(path.read_text())


def test_methods_in_a_file_count_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the command is given: as the strategy, and among a study's methods."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(
        "from florana.aggregate.mean import mean\ndef rule(parts, rank):\n    return mean(parts)\n"
    )
    table = changed("strategy.name", "mine.py:rule")
    table["study"] = {"methods": ["fedit", "mine.py:rule", "best-rank[carry_rank=2]"]}
    text = tomli_w.dumps(table)
    path = tmp_path / "recipes" / "r.toml"
    path.write_text(text)
    monkeypatch.chdir(tmp_path)
    own = f"{tmp_path.resolve()}/recipes/mine.py:rule"
    recipe = read_recipe(path)
    assert recipe.strategy["name"] == own
    assert recipe.study is not None
    assert recipe.study.methods == ["fedit", own, "best-rank[carry_rank=2]"]
    assert method_of(recipe.study.methods[1]).strategy["name"] == own
    path.write_text(text.replace("mine.py", "../recipes/mine.py"))
    assert read_recipe(path) == recipe
    path.write_text(text.replace("mine.py", "none.py"))
    with pytest.raises(RecipeError, match=r"there is no file .*recipes/none\.py"):
        read_recipe(path)
    path.write_text('study = 3\nstrategy = "fedit"\n')
    with pytest.raises(RecipeError, match="study"):
        read_recipe(path)
