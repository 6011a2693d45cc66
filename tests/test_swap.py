"""The fixed-updates ablation: the same updates for every rule, asked anew when the question changes, its correlation by
hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from florana.aggregate.mean import mean
from florana.recipe.load import check
from florana.study.fixed_updates import exchange, hold, swap
from florana.study.grid import plan_of
from florana.study.named_methods import method_of
from florana.study.publish import rank_correlation, summarise
from florana.study.runner import execute_study, swap_file


@pytest.fixture
def small(recipe_table: dict[str, Any]) -> dict[str, Any]:
    recipe_table["federation"] = {"rounds": 2}
    recipe_table["evaluate"] = {"personal": "last", "every": 1}
    return recipe_table


def test_another_swap_test_is_done_again_and_the_same_is_not(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the first question once stood for the second: no rows of the rules or rounds that came later."""

    def rows_after(methods: list[str], rounds: list[int]) -> list[dict[str, Any]]:
        small["study"] = {"controls": [], "methods": methods, "fixed_updates_rounds": rounds}
        plan = plan_of(check(small, "t"), seeds=1)
        assert execute_study(plan, tmp_path / "s", 1, lambda count, name: None) == {}
        rows: list[dict[str, Any]] = json.loads(swap_file(tmp_path / "s", plan.settings[0]).read_text())["rows"]
        return rows

    assert {row["method"] for row in rows_after(["fedit"], [1])} == {"fedit"}
    assert {row["method"] for row in rows_after(["fedit", "best-rank"], [1])} == {"fedit", "best-rank"}
    assert {row["round"] for row in rows_after(["fedit", "best-rank"], [1, 2])} == {1, 2}
    monkeypatch.setattr("florana.study.fixed_updates.swap", lambda *rest: pytest.fail("the same test was done again"))
    rows_after(["fedit", "best-rank"], [1, 2])


def test_the_swap_test_gives_every_rule_the_same_clients(small: dict[str, Any]) -> None:
    from florana.runs.prepared import prepare

    recipe = check(small, "t")
    methods = [method_of(n) for n in ("fedit", "best-rank", "oracle", "ffa-lora", "fed-sb", "fedsa-lora")]
    rows = swap(recipe, prepare(recipe), methods, [1, 2])
    assert {row["method"] for row in rows} == {"fedit", "best-rank", "oracle"}, "only rules that take whole pairs"
    for round_ in (1, 2):
        found = {row["method"]: row for row in rows if row["round"] == round_}
        assert found["oracle"]["error"] <= 1e-6 <= found["best-rank"]["error"] <= found["fedit"]["error"]
        assert found["fedit"]["optimum"] == pytest.approx(found["best-rank"]["error"], rel=0.02)
        assert len({row["optimum"] for row in found.values()}) == 1
        assert {"accuracy", "loss"} <= set(found["fedit"])


def test_each_rule_goes_on_from_its_own_merge_with_the_same_rows(small: dict[str, Any], tmp_path: Path) -> None:
    """FedIT gone on from its own merge is FedIT's next round; the others begin where they merged."""
    from florana.runs.prepared import prepare
    from florana.runs.setup import execute

    recipe = check({**small, "strategy": {"name": "fedit"}, "evaluate": {"personal": "never"}}, "t")
    setup = prepare(recipe)
    rows = swap(recipe, setup, [method_of(name) for name in ("fedit", "best-rank", "fedex-lora")], [1], rounds_on=1)
    on = {row["method"]: row["on"] for row in rows}
    run = execute(recipe, tmp_path / "run", setup=setup).records[1].eval["global"]
    assert on["fedit"] == pytest.approx(run, rel=1e-6)
    assert len({found["loss"] for found in on.values()}) == 3
    small["study"] = {"controls": [], "methods": ["fedit", "best-rank"], "fixed_updates_rounds": [1]}
    plans = [plan_of(check(small, "t"), seeds=1)]
    small["study"]["fixed_updates_rounds_on"] = 1
    plans.append(plan_of(check(small, "t"), seeds=1))
    kept = []
    for plan in plans:
        assert execute_study(plan, tmp_path / "s", 1, lambda count, name: None) == {}
        kept.append(json.loads(swap_file(tmp_path / "s", plan.settings[0]).read_text()))
    assert ["on" in found["rows"][0] for found in kept] == [False, True], "another question is asked anew"


def test_what_rules_came_to_is_summed_up_beside_what_they_merged() -> None:
    error = {"fedit": 0.3, "a": 0.2, "b": 0.1}
    rows = [
        {
            "setting": "s",
            "seed": seed,
            "round": 2,
            "method": name,
            "error": off,
            "loss": 1 + off,
            "on": {"loss": 1 - off},
        }
        for seed in (0, 1)
        for name, off in error.items()
    ]
    found = summarise(rows, "loss")
    assert [(one["when"], round(one["mean"])) for one in found["correlations"]] == [("", 1), ("gone on", -1)]
    gained = {(row["when"], row["method"]): row["minus_fedit"] for row in found["table"]}
    assert gained["", "b"] == pytest.approx(-0.2)
    assert gained["gone on", "b"] == pytest.approx(0.2)
    assert "round 2, gone on from there: " in found["text"][1]


def test_held_updates_are_those_of_the_run_and_only_asked_rounds_are_scored(small: dict[str, Any]) -> None:
    from florana.runs.prepared import prepare

    recipe = check({**small, "strategy": {"name": "fedit"}}, "t")
    setup = prepare(recipe)
    held = hold(recipe, setup, [2, 1])
    assert list(held) == [1, 2]
    before, parts = held[2]
    assert before.round == 1
    assert sum(part.weight for part in parts) == pytest.approx(1)
    merged = mean(held[1][1]).modules
    assert all(torch.equal(merged[name].B, pair.B) for name, pair in before.adapter.modules.items())
    rows = exchange(recipe, setup, [method_of("best-rank")], held, scored=[2])
    assert ["accuracy" in row for row in rows] == [False, True]


def test_the_swap_tests_correlation_is_signed_so_that_plus_means_lower_error_is_better() -> None:
    rows = [
        {
            "setting": "s",
            "seed": seed,
            "round": 1,
            "method": m,
            "error": e,
            "optimum": 0.1,
            "accuracy": a,
            "loss": 1 - a,
        }
        for seed in (0, 1)
        for m, e, a in (("fedit", 0.4, 0.5 + seed), ("flora-na", 0.3, 0.6 + seed), ("best-rank", 0.1, 0.9 + seed))
    ]
    for metric in ("accuracy", "loss"):
        assert summarise(rows, metric)["correlations"][0]["mean"] == pytest.approx(1.0)
    best = next(row for row in summarise(rows, "accuracy")["table"] if row["method"] == "best-rank")
    assert best["minus_fedit"] == pytest.approx(0.4)


def test_exact_rules_are_tied_and_not_ranked_by_rounding() -> None:
    """Oracle 3e-7 and FedEx 1e-7 from the truth, one score better than the other: noise must not decide the sign."""
    one = [(0.3, 0.5), (0.1, 0.6), (3e-7, 0.7), (1e-7, 0.4)]
    other = [(0.3, 0.5), (0.1, 0.6), (1e-7, 0.7), (3e-7, 0.4)]
    found = rank_correlation(one, "accuracy")
    assert found == rank_correlation(other, "accuracy")
    errors, scores = [3, 2, 0.5, 0.5], [1, 2, 3, 0]  # the ranks by hand, ties halved
    assert found == pytest.approx(-np.corrcoef(errors, scores)[0, 1])
    assert rank_correlation([(1e-7, 0.1), (2e-7, 0.2), (3e-7, 0.3)], "accuracy") is None
