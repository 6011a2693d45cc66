"""Tuning: levels and grids by hand, a winner that the validation rows name, nothing of it scored, diverging candidates,
resuming, Holm's correction, and validation rows that nobody else uses."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as some
from rich.console import Console

from florana.cli.display_study import forecast_table
from florana.errors import InputError, RecipeError
from florana.federation.journal import read_records
from florana.recipe.load import check
from florana.recipe.schema import Data
from florana.runs.prepared import prepare
from florana.study.estimates import holm
from florana.study.forecast import forecast
from florana.study.formats import markdown, tuned_cells
from florana.study.grid import plan_of, recipe_of
from florana.study.named_methods import method_of
from florana.study.publish import publish
from florana.study.runner import execute_study, folder_of, tune_study
from florana.study.table import compare
from florana.study.tune import grid_of, jobs_of, levels, require_tunable, rounds_of, tuned_values
from florana.train.data.sources import load_tables
from tests.program import florana

MOMENTUM = "best-rank[server.optimizer=momentum]"


@pytest.fixture
def table(recipe_table: dict[str, Any]) -> dict[str, Any]:
    recipe_table["federation"] = {"rounds": 4}
    recipe_table["evaluate"] = {"personal": "never", "every": 4}
    recipe_table["data"]["validation_share"] = 0.2
    recipe_table["study"] = {
        "seeds": 2,
        "methods": ["fedit", MOMENTUM],
        "controls": [],
        "fixed_updates_rounds": [1],
        "tune": {"train.learning_rate": [3.0, 0.01], "server.learning_rate": [0.5, 1.0]},
        "comparisons": [[MOMENTUM, "fedit"]],
    }
    return recipe_table


@given(some.integers(1, 40), some.integers(1, 300))
def test_levels_halve_the_candidates_and_double_the_rounds(count: int, rounds: int) -> None:
    found = levels(count, rounds)
    assert found[0][0] == count
    assert found[-1][1] == rounds
    assert found[-1][0] <= 2
    for (left, until), (then, later) in itertools.pairwise(found):
        assert then == math.ceil(left / 2)
        assert until <= later <= 2 * until


def test_a_key_that_means_nothing_to_a_method_is_left_out_for_it(table: dict[str, Any]) -> None:
    plan = plan_of(check(table, "t"))
    assert grid_of(plan, method_of("fedit")) == [{"train.learning_rate": 3.0}, {"train.learning_rate": 0.01}]
    assert len(grid_of(plan, method_of(MOMENTUM))) == 4
    assert [rounds_of(job) for job in jobs_of(plan, Path("x"), 1)] == [2 * 4, 4 * 2 + 2 * 2]


def test_a_misspelt_key_is_refused(table: dict[str, Any]) -> None:
    plan = plan_of(check(table, "t"), tune={"train.learnin_rate": [1.0]})
    with pytest.raises(RecipeError, match="did you mean 'learning_rate'"):
        require_tunable(plan)
    with pytest.raises(RecipeError, match="is not key=value,value"):
        tuned_values(["train.learning_rate"])


def test_tuning_without_validation_rows_is_refused(table: dict[str, Any]) -> None:
    del table["data"]["validation_share"]
    with pytest.raises(RecipeError, match=r"data.validation_share = 0\.1"):
        plan_of(check(table, "t"))


def test_each_method_gets_what_the_validation_rows_chose_and_nothing_is_scored_twice(
    table: dict[str, Any], tmp_path: Path
) -> None:
    plan, out, told = plan_of(check(table, "t")), tmp_path / "study", []
    tuned, tried, failed = tune_study(plan, out, 1, lambda count, name: told.append(name))
    assert failed == {}
    assert len(told) == sum(rounds_of(job) for job in jobs_of(plan, out, 1))
    assert tuned.tuned["as-recipe", "fedit"] == {"train.learning_rate": 0.01}
    assert tuned.tuned["as-recipe", MOMENTUM]["train.learning_rate"] == 0.01
    for one in tried:
        figures = [c.figure for c in one.candidates if c.rounds == 4]
        chosen = next(c for c in one.candidates if c.settings == one.chosen)
        assert chosen.figure == min(figures)  # type: ignore[type-var]
        assert one.rounds == sum(c.rounds for c in one.candidates)
        assert "learning_rate=0.01" in tuned_cells(one)[2]
    runs = sorted((out / "tune").rglob("setup.json"))
    sizes = {(json.loads(run.read_text())["common_test"], json.loads(run.read_text())["validation"]) for run in runs}
    rows = prepare(recipe_of(plan.base, plan.cells[0]))
    assert sizes == {(len(rows.validation), 0)}  # what was measured is the validation rows, and nothing else is there
    assert all("seed = 1003" in (run.parent / "recipe.toml").read_text() for run in runs)

    again: list[str] = []
    assert tune_study(plan, out, 1, lambda count, name: again.append(name))[0] == tuned
    assert again == []

    assert execute_study(tuned, out, 1, lambda count, name: None) == {}
    for cell in tuned.cells:
        assert "learning_rate = 0.01" in (folder_of(out, cell) / "recipe.toml").read_text()
    comparison, _, page = publish(tuned, out, {}, tried)
    (declared,) = comparison.declared
    assert (declared.first, declared.second, declared.p_value) == (MOMENTUM, "fedit", None)  # of two seeds: no test
    text = markdown(comparison, tried)
    assert f"{MOMENTUM} minus fedit" in text
    assert "| as-recipe | fedit | learning_rate=0.01 |" in text
    assert "The declared comparisons" in page.read_text()
    assert "What was tuned" in page.read_text()
    assert len(json.loads((out / "study.json").read_text())["tuning"]) == 2


def test_a_method_all_of_whose_candidates_fail_is_a_gap_and_the_rest_goes_on(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["study"]["tune"] = {"server.learning_rate": [1e30, 1e35]}
    plan = plan_of(check(table, "t"))
    tuned, _, failed = tune_study(plan, tmp_path, 1, lambda count, name: None)
    assert set(failed) == {cell.id for cell in plan.cells if cell.method.label == MOMENTUM}
    assert "every candidate of its tuning failed" in next(iter(failed.values()))
    assert execute_study(tuned, tmp_path, 1, lambda count, name: None, failed) == failed
    rows = {row.method: (row.seeds, row.failed) for row in compare(tuned, tmp_path).rows}
    assert rows == {"fedit": (2, 0), MOMENTUM: (0, 2)}


def test_a_study_whose_fedit_cannot_be_tuned_goes_on_without_the_ablation(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["study"] |= {"tune": {"train.learning_rate": [1e25, 1e30]}, "seeds": 1}
    plan = plan_of(check(table, "t"))
    tuned, _, failed = tune_study(plan, tmp_path, 1, lambda count, name: None)
    assert set(failed) == {cell.id for cell in plan.cells}
    assert execute_study(tuned, tmp_path, 1, lambda count, name: None, failed) == failed
    assert not (tmp_path / "swap").exists()


def test_a_model_that_cannot_be_loaded_is_said_of_every_candidate(table: dict[str, Any], tmp_path: Path) -> None:
    """No run folder is made then, and the tuning's own file still has a place."""
    table["model"] = {**table["model"], "base": str(tmp_path / "nowhere")}
    _, _, failed = tune_study(plan_of(check(table, "t")), tmp_path / "out", 1, lambda count, name: None)
    assert failed
    assert all("every candidate of its tuning failed" in why and "nowhere" in why for why in failed.values())


def test_cells_with_settings_of_their_own_train_with_them(table: dict[str, Any], tmp_path: Path) -> None:
    table["study"] |= {"tune": {}, "methods": ["fedit", "fedit[train.learning_rate=1e-9]"], "seeds": 1}
    table["study"]["comparisons"] = []
    plan = plan_of(check(table, "t"))
    assert plan.comparisons == [("fedit[train.learning_rate=1e-09]", "fedit")]
    assert execute_study(plan, tmp_path, 1, lambda count, name: None) == {}
    first, still = (read_records(folder_of(tmp_path, cell) / "rounds.jsonl")[-1].eval["global"] for cell in plan.cells)
    assert first["loss"] != still["loss"]
    assert not jobs_of(plan, tmp_path, 1)


def test_a_declared_comparison_of_no_method_is_refused(table: dict[str, Any]) -> None:
    table["study"]["comparisons"] = [["best-rank", "fedit"]]
    with pytest.raises(RecipeError, match="'best-rank', which is none of the methods"):
        plan_of(check(table, "t"))


def test_the_forecast_counts_the_tuning(table: dict[str, Any], tmp_path: Path) -> None:
    lines = forecast(plan_of(check(table, "t")), tmp_path)
    assert [(line.method, line.rounds_left) for line in lines] == [
        ("tuning of fedit", 8),
        (f"tuning of {MOMENTUM}", 12),
        ("fedit", 8),
        (MOMENTUM, 8),
    ]
    assert all(line.seconds > 0 for line in lines)
    drawn = io.StringIO()
    Console(file=drawn, width=80).print(forecast_table(lines))
    assert "tuning of fedit" in drawn.getvalue()
    assert max(map(len, drawn.getvalue().splitlines())) <= 80


def test_compare_tunes_from_the_command_line(table: dict[str, Any], tmp_path: Path) -> None:
    table["study"] |= {"tune": {}, "seeds": 1}
    (tmp_path / "r.toml").write_text(tomli_w.dumps(table))
    arguments = ["compare", str(tmp_path / "r.toml"), "--tune", "train.learning_rate=1e-9,0.01"]
    arguments += ["--out", "s", "--jobs", "1"]
    done = florana(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 rounds to do after 16 of tuning" in done.stdout
    assert "declared" in json.loads((tmp_path / "s" / "study.json").read_text())


@given(some.lists(some.floats(0, 1), min_size=1, max_size=8))
def test_holm_by_its_definition(values: list[float]) -> None:
    """Rejected at level a: the i-th smallest p is, and all before it are, at most a / (m - i + 1)."""
    adjusted = holm({str(index): p for index, p in enumerate(values)})
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected: set[str] = set()
        for place, (p, index) in enumerate(sorted((p, index) for index, p in enumerate(values))):
            if p * (len(values) - place) > level:
                break
            rejected.add(str(index))
        assert {name for name, p in adjusted.items() if p is not None and p <= level} == rejected


def test_holm_counts_comparisons_without_a_test() -> None:
    assert holm({"a": 0.02, "b": None}) == {"a": 0.04, "b": None}


def test_validation_rows_are_nobody_elses_and_the_same_for_the_same_seed(recipe_table: dict[str, Any]) -> None:
    plain = prepare(check(recipe_table, "t"))
    recipe_table["data"]["validation_share"] = 0.25
    one, two = prepare(check(recipe_table, "t")), prepare(check(recipe_table, "t"))
    recipe_table["seed"] += 1
    other = prepare(check(recipe_table, "t"))

    def held(setup: Any) -> list[tuple[int, ...]]:
        clients = [row for data in setup.clients.values() for row in (*data.train, *data.test)]
        return sorted(tuple(row.ids) for row in clients)

    validation = sorted(tuple(row.ids) for row in one.validation)
    assert sorted(held(one) + validation) == held(plain)
    assert len(validation) == round(len(held(plain)) * 0.25)
    assert [row.ids for row in one.common] == [row.ids for row in plain.common]
    assert validation == sorted(tuple(row.ids) for row in two.validation)
    assert validation != sorted(tuple(row.ids) for row in other.validation)
    assert plain.validation == ()


def test_a_validation_file_is_checked_as_the_others_are(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    recipe_table["data"]["validation"] = str(path)
    tables = check(recipe_table, "t").data
    path.write_text("text,label\na word,good\n")
    label = load_tables(tables.model_copy(update={"validation": None}), "sequence-classification", 0).labels[0]
    path.write_text(f"text,label\na word,{label}\n")
    found = load_tables(tables, "sequence-classification", 0)
    assert found.validation is not None
    assert found.validation["class_index"] == [0]
    for content, message in [
        ("text,label\na word,no such label\n", "v.csv never occurs in the training rows"),
        ("text,labl\na word,x\n", "has no column 'label'"),
        ("text,label\n", "no rows"),
        ("text,label\na word,\n", "no value in column 'label'"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_tables(tables, "sequence-classification", 0)


def test_one_hub_name_may_hold_all_three(recipe_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each split is its own, though all have one name."""

    def loaded(name: str, config: str | None, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [split, f"more {split}"], "label": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    settings = Data(train="some/name", test="some/name", validation="some/name", text="text", label="label")
    tables = load_tables(settings, "sequence-classification", 0)
    assert tables.validation is not None
    found = [table["text"][0] for table in (tables.train, tables.test, tables.validation)]
    assert found == ["train", "test", "validation"]
    for change in ({"validation_split": "test"}, {"validation_split": "train"}, {"test_split": "validation"}):
        with pytest.raises(InputError, match="are the same rows"):
            load_tables(settings.model_copy(update=change), "sequence-classification", 0)


def test_a_file_that_is_trained_on_or_scored_chooses_nothing(recipe_table: dict[str, Any]) -> None:
    train = recipe_table["data"]["train"]
    recipe_table["data"] |= {"validation": train}
    with pytest.raises(InputError, match=r"data.validation and data.train are the same rows"):
        load_tables(check(recipe_table, "t").data, "sequence-classification", 0)
    recipe_table["data"] |= {"train_split": "train[:40]", "validation_split": "train[40:60]"}
    tables = load_tables(check(recipe_table, "t").data, "sequence-classification", 0)
    assert tables.validation is not None
    assert len(tables.validation) == 20
