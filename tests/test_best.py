"""The best round on the validation rows: which it is, that its adapter is kept over kills, and when a run ends."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import load_file

from florana.errors import RecipeError
from florana.federation.best import best_round, enough
from florana.federation.event import Event
from florana.federation.journal import Journal, read_records
from florana.federation.loop import run_rounds
from florana.federation.round_record import RoundRecord
from florana.federation.terms import Federation
from florana.recipe.load import check
from florana.runs.rounds import Result
from florana.runs.setup import execute
from florana.strategy.base import State
from tests.federation import CARD, FakeEngine, built, federation, first_adapter, noisy
from tests.program import florana, struck

PLAIN = RoundRecord(1, "fedit", [], {}, {}, {}, None, {}, 0, 0, 0.0, 0.0, {"overall": None})


def records(values: list[float | None], figure: str = "loss") -> list[RoundRecord]:
    """One record for each value, not measured where the value is -1."""
    return [
        replace(PLAIN, round=index, eval={} if value == -1 else {"validation": {figure: value}})
        for index, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("values", "figure", "best"),
    [
        ([3.0, 1.0, 2.0], "loss", 2),
        ([3.0, 1.0, 2.0], "accuracy", 1),
        ([1.0, 1.0], "perplexity", 1),
        ([-1, 5.0, -1], "loss", 2),
        ([None, 4.0], "loss", 2),
        ([None, None], "loss", None),
        ([-1, -1], "loss", None),
        ([], "loss", None),
    ],
)
def test_the_first_of_the_best_rounds(values: list[float | None], figure: str, best: int | None) -> None:
    assert best_round(records(values, figure), figure) == best


@given(some.lists(some.floats(-5, 5).filter(lambda x: x != -1), min_size=1, max_size=8), some.integers(1, 4))
def test_patience_is_counted_since_the_best_round(values: list[float], patience: int) -> None:
    """An oracle by the definition: the run as it would have been watched, round after round."""
    best, waited, ended = float("inf"), 0, False
    for value in values:
        waited = 0 if value < best else waited + 1
        best = min(best, value)
        ended = waited >= patience
    assert enough(records(values), "loss", patience) == ended  # type: ignore[arg-type]


def test_without_patience_a_run_never_ends_early() -> None:
    assert not enough(records([1.0] * 9), "loss", None)


def test_a_figure_that_the_rows_do_not_have_is_named() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.by is 'f1'"):
        best_round(records([1.0], "macro_f1"), "f1")


LOSSES = [5.0, 3.0, 1.0, 2.0, 4.0, 1.5, 0.5, 3.0, 3.0, 3.0]
"""The best round is the third until the seventh."""


def chosen(folder: Path, strategy: str, rounds: int, patience: int | None = None) -> State:
    """Run, or continue, a fake federation whose model is as good as LOSSES says, the best one kept."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, CARD, "loss")
    last, _ = journal.recover()
    method = built(strategy)
    whole: Federation = replace(
        federation(rounds),
        validate=lambda state: {"loss": LOSSES[state.round - 1]},
        enough=lambda found: enough(found, "loss", patience),
    )
    engine = FakeEngine(lambda brief: [noisy(brief, strategy)], last.memories if last else None)
    state = last.state if last else method.init(first_adapter())
    return run_rounds(method, state, engine, whole, journal, lambda event: None)


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("rounds", "best"), [(2, 2), (3, 3), (5, 3), (6, 3), (7, 7), (10, 7)])
def test_the_adapter_is_the_best_rounds(rounds: int, best: int, tmp_path: Path) -> None:
    chosen(tmp_path / "whole", "best-rank", rounds)
    chosen(tmp_path / "to the best", "best-rank", best)
    assert adapter_of(tmp_path / "whole") == adapter_of(tmp_path / "to the best")
    kept = {path.name for path in (tmp_path / "whole" / "checkpoint").iterdir()}
    assert kept == {f"round-{round_:06d}" for round_ in {best, rounds - 1, rounds}}


def test_a_lost_adapter_folder_is_made_again_from_the_best_checkpoint(tmp_path: Path) -> None:
    chosen(tmp_path, "oracle", 6)
    before = adapter_of(tmp_path)
    shutil.rmtree(tmp_path / "adapter")
    assert Journal(tmp_path, CARD, "loss").recover()[1] == []
    assert adapter_of(tmp_path) == before


def test_a_damaged_best_checkpoint_is_named_and_the_adapter_stays(tmp_path: Path) -> None:
    chosen(tmp_path, "fedit", 6)
    before = adapter_of(tmp_path)
    target = tmp_path / "checkpoint" / "round-000003" / "state.safetensors"
    target.write_bytes(target.read_bytes()[:-1])
    (line,) = Journal(tmp_path, CARD, "loss").recover()[1]
    assert "the best round, 3, is damaged; adapter/ stays as it is" in line
    assert adapter_of(tmp_path) == before


def test_patience_ends_a_run_and_a_resumed_one_stays_ended(tmp_path: Path) -> None:
    assert chosen(tmp_path, "fedit", 10, patience=2).round == 5  # two rounds after the third
    assert chosen(tmp_path, "fedit", 10, patience=2).round == 5
    assert chosen(tmp_path, "fedit", 10, patience=4).round == 10  # as if it had been so from the start


def test_kills_at_every_step_keep_the_best_and_end_where_the_run_left_alone_ends(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    chosen(tmp_path / "alone", "flora-na", 10, 4)
    for step in range(1, 24, 3):
        struck(chosen, (folder, "flora-na", 10, 4), folder, step)
    chosen(folder, "flora-na", 10, 4)
    assert adapter_of(folder) == adapter_of(tmp_path / "alone")
    ends = [len(read_records(place / "rounds.jsonl")) for place in (folder, tmp_path / "alone")]
    assert ends == [10, 10]


def ran(table: dict[str, Any], folder: Path, **more: Any) -> tuple[Result, list[Event]]:
    told: list[Event] = []
    return execute(check(table, "t"), folder, show=told.append, **more), told


def test_a_run_keeps_the_best_measured_round_by_its_validation_rows(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe_table["data"]["validation_share"] = 0.2
    recipe_table["evaluate"] = {"keep": "best", "by": "accuracy", "personal": "never"}
    recipe_table["train"]["learning_rate"] = 0.3  # so that the last round is not the best one
    recipe_table["federation"]["rounds"] = 5
    result, _ = ran(recipe_table, tmp_path / "run")
    scores = [record.eval["validation"]["accuracy"] for record in result.records]
    best = best_round(result.records, "accuracy")
    assert best == scores.index(max(scores)) + 1 != 5
    (tmp_path / "r.toml").write_text(tomli_w.dumps(recipe_table))
    done = florana("run", "r.toml", "--out", "told", cwd=tmp_path)
    assert f"(of round {best}, the best by accuracy on the validation rows)" in done.stdout
    again = {**recipe_table, "evaluate": {"personal": "never"}, "federation": {**recipe_table["federation"]}}
    again["federation"]["rounds"] = best
    ran(again, tmp_path / "shorter")
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "shorter"))
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)


def test_a_run_whose_patience_is_over_says_so_and_ends_well(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["data"]["validation_share"] = 0.2
    recipe_table["evaluate"] = {"patience": 1, "personal": "never"}
    recipe_table["train"]["learning_rate"] = 1e-9  # nothing gets better
    recipe_table["federation"]["rounds"] = 9
    result, told = ran(recipe_table, tmp_path / "run")
    assert len(result.records) < 9
    assert [event.kind for event in told][-1] == "ended"
    assert "patience" in told[-1].detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluate": {"keep": "best"}}, "validation_share = 0.1"),
        ({"evaluate": {"patience": 2}}, "validation_share = 0.1"),
        ({"evaluate": {"keep": "best", "by": "acuracy"}}, "evaluate.by is 'acuracy'; of sequence-classification: loss"),
        ({"evaluate": {"keep": "best", "by": "pearson"}}, "evaluate.by is 'pearson'"),
        ({"evaluate": {"keep": "best"}, "model": {"head": "personal"}}, "nothing may be personal"),
        ({"evaluate": {"patience": 2}, "strategy": {"name": "local-only"}}, "no model of its own to measure"),
        ({"data": {"validation": "v.csv"}}, "are both given"),
        ({"data": {"validation_share": 1.0}}, "less than 1"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, recipe_table: dict[str, Any]
) -> None:
    if change.get("evaluate", {}) != {"keep": "best"} or "model" in change:
        recipe_table["data"]["validation_share"] = 0.1
    if "validation_share = 0.1" in message:
        recipe_table["data"].pop("validation_share", None)
    for section, keys in change.items():
        recipe_table.setdefault(section, {}).update(keys)
    with pytest.raises(RecipeError, match=message):
        check(recipe_table, "t")
