"""What a server may ask of a site in a day, and in a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florana.errors import FederationError, InputError, RecipeError
from florana.federation.messages import Brief, pack
from florana.flower.app.codec import brief_frame
from florana.flower.app.frames import Frame
from florana.flower.app.site import site_of
from florana.flower.app.site_card import digest
from florana.flower.deploy.quota import DAY, Quota, limited
from florana.recipe.load import check
from florana.runs.prepared import prepare
from tests.flower_sites import sites

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@given(st.lists(st.floats(0, DAY), max_size=30), st.integers(1, 5))
def test_no_window_of_a_day_has_more_trainings_than_may_be(
    tmp_path_factory: pytest.TempPathFactory, pauses: list[float], most: int
) -> None:
    now, taken = 1e9, []
    quota = Quota(tmp_path_factory.mktemp("q") / "kept" / "trained.json", most, lambda: now)
    quota.path.parent.mkdir()
    for pause in pauses:
        now += pause
        if sum(then > now - DAY for then in taken) < most:
            quota.take()
            taken.append(now)
        else:
            with pytest.raises(FederationError, match=f"its own limit is {most}"):
                quota.take()
    for end in taken:
        assert sum(end - DAY < then <= end for then in taken) <= most


def test_a_count_outlives_the_program_and_a_damaged_one_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "trained.json"
    Quota(path, 1, lambda: 5.0).take()
    with pytest.raises(FederationError, match="has trained 1 times within 24 hours"):
        Quota(path, 1, lambda: 6.0).take()
    assert json.loads(path.read_text()) == [5.0]
    for rubbish in ("[", '["x"]', "{}{}", "7"):
        path.write_text(rubbish)
        with pytest.raises(InputError, match="cannot be read"):
            Quota(path, 9, lambda: 6.0).take()


def test_a_server_that_asks_too_often_or_beyond_the_run_gets_no_training(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe_table["federation"] = {"rounds": 2}
    site = next(iter(sites(check(recipe_table, "t"), tmp_path / "kept").values()))
    trained: list[int] = []

    def fit(brief: Brief, memory: Any) -> Any:
        trained.append(brief.round)
        return site.fit(brief, memory)

    held = replace(site, fit=limited(fit, Quota(tmp_path / "trained.json", 3)))
    brief = Brief(1, site.who, 0, pack(site.start), False, ["A", "B"], ["A", "B"], site.start.scalings)

    def ask(round_: int, run: str) -> str:
        frame = brief_frame(replace(brief, round=round_), run, "nonce", digest(site.card))
        answer = held.answer(frame)
        return "" if answer.kind == "reply" else str(answer.fields["reason"])

    assert [ask(1, "a"), ask(2, "a")] == ["", ""]
    for beyond in (0, 3, -1, 10**9):
        assert "by its own recipe a run has 2" in ask(beyond, "a")
    assert ask(1, "made-up") == ""
    assert "its own limit is 3" in ask(1, "another")
    assert trained == [1, 2, 1]


def test_a_request_for_what_a_site_no_longer_is_trains_nothing(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """The card is what it said of itself at registration: with another one it has been started anew."""
    site = next(iter(sites(check(recipe_table, "t"), tmp_path / "kept").values()))
    trained: list[int] = []
    held = replace(site, fit=lambda brief, memory: trained.append(brief.round))
    brief = Brief(1, site.who, 0, pack(site.start), False, ["A", "B"], ["A", "B"], site.start.scalings)
    assert held.answer(brief_frame(brief, "run", "nonce", "of another")).kind == "changed"
    assert trained == []


def test_a_site_is_one_of_its_own_data(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = check(recipe_table, "t")
    with pytest.raises(RecipeError, match="there is no client 'nobody'"):
        site_of(recipe, prepare(recipe), "nobody", tmp_path)


def test_a_start_from_all_clients_gradients_is_refused_at_a_site(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["strategy"] = {"name": "fed-sb", "begin": "gradient"}
    recipe_table["model"]["rank"] = 4
    recipe = check(recipe_table, "t")
    with pytest.raises(RecipeError, match="in a simulation of one process only"):
        site_of(recipe, prepare(recipe), "client-0", tmp_path)


def test_a_request_that_its_own_recipe_does_not_have_trains_nothing(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """As another site, sealed where updates are open, in another format, with a memory that no format asks for."""
    site = next(iter(sites(check(recipe_table, "t"), tmp_path / "kept").values()))
    trained: list[int] = []
    held = replace(site, fit=lambda brief, memory: trained.append(brief.round))
    brief = Brief(1, site.who, 0, pack(site.start), False, ["A", "B"], ["A", "B"], site.start.scalings)
    for change, reason in (
        ({"client": "another"}, f"is '{site.who}', but was asked as 'another'"),
        ({"sealed": True}, "an update that is sealed; by its own recipe they are open"),
        ({"uplink": "int8"}, "asked to answer in int8; its own recipe says float32"),
        ({"feedback": True}, "asked to answer in float32; its own recipe says float32"),
    ):
        answer = held.answer(brief_frame(replace(brief, **change), "run", "nonce", digest(site.card)))
        assert (answer.kind, reason in answer.fields["reason"]) == ("failure", True), answer.fields
    assert trained == []


def test_a_step_of_a_secure_sum_is_answered_by_who_has_such_sums_and_is_still_the_same(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    site = next(iter(sites(check(recipe_table, "t"), tmp_path / "kept").values()))
    fields = {"run": "run", "nonce": "nonce", "step": "keys"}
    told = site.answer(Frame("sealed", {**fields, "card": digest(site.card)}))
    assert (told.kind, told.fields["reason"]) == ("failure", "is asked for a secure sum; its own recipe has none")
    anew = replace(site, sealed=SimpleNamespace(answer=lambda *given: pytest.fail("it answered")))
    assert anew.answer(Frame("sealed", {**fields, "card": "of another"})).kind == "changed"
