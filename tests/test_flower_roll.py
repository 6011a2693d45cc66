"""Registration: who takes part, who is refused and why, and that one who differs ends nothing for the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import RecordDict

from florana.errors import FederationError
from florana.federation.event import Event
from florana.federation.journal import read_records
from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame
from florana.flower.app.site import Site
from florana.recipe.schema import Recipe
from tests.flower_grid import FakeGrid
from tests.flower_sites import grid_of, led, roster_of, sites

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def saying(who: int, change: Callable[[dict[str, Any]], object]) -> Callable[..., RecordDict]:
    """A node that says something else at registration than it should."""

    def tamper(node: int, asked: Frame, content: RecordDict) -> RecordDict:
        if node != who or asked.kind != "hello" or asked.fields:
            return content
        said = dict(from_record(content).fields)
        change(said)
        return to_record(Frame("hello", said))

    return tamper


def refusals(events: list[Event]) -> dict[str, str]:
    return {event.client: event.detail for event in events if event.kind == "refused" and event.round == 0}


def test_a_site_that_does_not_fit_is_refused_and_the_others_go_on(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    grid = grid_of(members, tamper=saying(2, lambda said: said["agreed"].update(seed=9)))
    refused = refusals(led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run"))
    assert refused.keys() == {"client-1"}
    assert "has another recipe" in refused["client-1"]
    assert "seed is 9, here 3" in refused["client-1"]
    record = read_records(tmp_path / "run" / "rounds.jsonl")[0]
    assert record.clients == ["client-0", "client-2"]
    assert "another recipe" in record.refused["client-1"]


SAYINGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another base model": (lambda said: said["common"].update(base="0" * 64), "in its base model ("),
    "another start": (lambda said: said["common"].update(start="0" * 64), "in its adapter to start from ("),
    "other classes": (lambda said: said["common"].update(labels=["x"]), "in its classes ("),
    "other scalings": (lambda said: said["common"].update(scalings={"q": 7.0}), "in its LoRA scalings ("),
    "another format": (lambda said: said["common"]["adapter"].update(rslora=True), "in its adapter configuration ("),
    "another's name": (lambda said: said.update(client="client-0"), "but its key is that of"),
    "rows below zero": (lambda said: said["holds"].update(train=-1), "holds.train: Input should be greater"),
    "true rows": (lambda said: said["holds"].update(train=True), "holds.train: Input should be a valid integer"),
    "rows of a thousand digits": (
        lambda said: said["holds"].update(train=10**1000),
        "holds.train: Input should be less",
    ),
    "a long word": (lambda said: said.update(torch="x" * 201), "torch: String should have at most 200"),
    "many classes": (lambda said: said["holds"].update(per_label=[0] * 100_001), "holds.per_label: List should have"),
    "no threads": (lambda said: said.update(threads=0), "threads: Input should be greater"),
    "a recipe that is a list": (lambda said: said.update(agreed=[1]), "agreed: Input should be a valid dictionary"),
    "an infinite scaling": (lambda said: said["common"].update(scalings={"q": math.inf}), "scalings"),
    "nothing": (lambda said: said.clear(), "does not introduce itself as florana does"),
    "more than asked": (lambda said: said.update(rows=["secret"]), "rows: Extra inputs"),
}


@pytest.mark.parametrize(
    ("base", "who"),
    [(True, 0), (False, 0), (False, 2)],
    ids=["base at the server", "no base, the first site", "no base, the last site"],
)
@pytest.mark.parametrize("saying_", SAYINGS)
def test_the_roll_call_refuses_the_one_that_differs(
    saying_: str, base: bool, who: int, pooled: Recipe, tmp_path: Path
) -> None:
    change, says = SAYINGS[saying_]
    name = f"client-{who}"
    if saying_ == "another's name" and who == 0:
        change = lambda said: said.update(client="client-1")  # noqa: E731
    members = sites(pooled, tmp_path / "kept")
    grid = grid_of(members, tamper=saying(who + 1, change))
    refused = refusals(led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run", base=base))
    assert refused.keys() == {name}
    assert says in refused[name]
    if "in its" in says:
        assert refused[name].startswith("differs from the server" if base else "differs from 'client-")
    for record in read_records(tmp_path / "run" / "rounds.jsonl"):
        assert record.clients == sorted(members.keys() - {name}), "one that differs ends nothing for the others"


def test_a_start_that_is_not_the_one_it_said_is_taken_from_another(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")

    def tamper(node: int, asked: Frame, content: RecordDict) -> RecordDict:
        if node == 1 and asked.fields.get("start"):
            frame = from_record(content)
            return to_record(Frame("hello", frame.fields, save({n: t + 1 for n, t in load(frame.payload).items()})))
        return content

    led(pooled, grid_of(members, tamper=tamper), roster_of(members, tmp_path), tmp_path / "run")
    led(pooled, grid_of(members), roster_of(members, tmp_path), tmp_path / "other")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    lying = grid_of({"client-0": members["client-0"]}, tamper=tamper)
    with pytest.raises(FederationError, match=r"no client sent the adapter to start from\nwhy: client-0: sent another"):
        led(pooled, lying, roster_of(members, tmp_path), tmp_path / "none")


def test_a_node_whose_key_is_not_approved_is_not_even_asked(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    grid = grid_of(members)
    grid.nodes = {**grid.nodes, 9: (b"a stranger", members["client-0"].answer)}
    events = led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run")
    assert 9 not in {node for node, _ in grid.sent}
    assert refusals(events) == {"node 9": "its key is none of the approved ones"}


def test_of_two_nodes_of_one_name_the_first_takes_part(pooled: Recipe, tmp_path: Path) -> None:
    """In a simulation, which has no keys: nobody's rows count twice, and nobody is put in another's place."""
    members = sites(pooled, tmp_path / "kept")
    asked: list[str] = []

    def second(frame: Frame) -> Frame:
        asked.append(frame.kind)
        return members["client-0"].answer(frame)

    grid = grid_of(members)
    grid.nodes = {**grid.nodes, 3: (b"", second)}
    events = led(pooled, grid, "", tmp_path / "run")
    assert refusals(events)["client-0"] == "two nodes call themselves 'client-0'"
    assert "train" not in asked
    assert read_records(tmp_path / "run" / "rounds.jsonl")[0].clients == ["client-0", "client-1"]


def test_a_site_that_joins_late_is_held_to_the_rows_it_said(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    late: set[int] = set()

    def tamper(node: int, asked: Frame, content: RecordDict) -> RecordDict:
        if asked.kind == "train" and not late:
            late.add(3)
            grid.nodes = every
        if node != 3 or asked.kind != "train":
            return content
        frame = from_record(content)
        reply = {**frame.fields["reply"], "examples": 12_345}
        return to_record(Frame("reply", {**frame.fields, "reply": reply}, frame.payload))

    grid = grid_of(members, tamper=tamper)
    every = grid.nodes
    grid.nodes = {node: who for node, who in every.items() if node != 3}
    led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run")
    refused = [record.refused["client-2"] for record in read_records(tmp_path / "run" / "rounds.jsonl")]
    assert refused[0] == "is not connected"
    assert "reports 12345 training examples, but has " in refused[1]


def test_without_a_quorum_the_run_ends_and_says_who_is_missing(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    recipe = pooled.model_copy(update={"federation": pooled.federation.model_copy(update={"min_clients": 3})})
    two = dict(list(members.items())[:2])
    with pytest.raises(FederationError, match=r"2 clients were there after 0.2 seconds, and 3 are needed"):
        led(recipe, grid_of(two), roster_of(members, tmp_path), tmp_path / "run")


def test_a_server_that_has_all_its_sites_waits_no_longer(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    led(pooled, grid_of(members), roster_of(members, tmp_path), tmp_path / "run", wait=1e6)
    assert len(read_records(tmp_path / "run" / "rounds.jsonl")) == pooled.federation.rounds


def restarted(site: Site, **changes: Any) -> Callable[[Frame], Frame]:
    """The same site, started anew with something else."""
    return replace(site, card=site.card.model_copy(update=changes)).answer


def in_round(number: int, grid: FakeGrid, act: Callable[[], None]) -> Callable[..., RecordDict]:
    """Something happens while the first site answers in that round."""

    def tamper(node: int, asked: Frame, content: RecordDict) -> RecordDict:
        if node == 1 and asked.kind == "train" and asked.fields["brief"]["round"] == number:
            act()
        return content

    return tamper


def test_a_site_that_was_started_anew_with_other_rows_is_asked_anew(pooled: Recipe, tmp_path: Path) -> None:
    recipe = pooled.model_copy(update={"federation": pooled.federation.model_copy(update={"rounds": 4})})
    members = sites(recipe, tmp_path / "kept")
    grid, card = grid_of(members), members["client-2"].card
    other = restarted(members["client-2"], holds=card.holds.model_copy(update={"train": card.holds.train + 1}))
    grid.tamper = in_round(1, grid, lambda: grid.nodes.update({3: (b"client-2", other)}))
    grid.nodes = dict(grid.nodes)
    led(recipe, grid, roster_of(members, tmp_path), tmp_path / "run")
    refused = [record.refused.get("client-2", "") for record in read_records(tmp_path / "run" / "rounds.jsonl")]
    # in round 1 it was started anew before it was asked
    assert "is not as it was at registration" in refused[0]
    assert "were approved or counted before" in refused[1], "it says one row more"
    hellos = [number for number, (node, frame) in enumerate(grid.sent) if node == 3 and frame.kind == "hello"]
    assert len(hellos) == 2, "once at the start, once in doubt"


def test_a_site_that_was_started_anew_with_another_model_is_refused(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    grid, card = grid_of(members), members["client-2"].card
    other = restarted(members["client-2"], common=card.common.model_copy(update={"base": "0" * 64}))
    grid.nodes = dict(grid.nodes)
    grid.tamper = in_round(1, grid, lambda: grid.nodes.update({3: (b"client-2", other)}))
    led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run")
    first, second = (record.refused["client-2"] for record in read_records(tmp_path / "run" / "rounds.jsonl"))
    assert "is not as it was at registration" in first
    assert second.startswith("differs from 'client-0' in its base model")


def test_a_site_that_was_mended_is_asked_again(pooled: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florana.flower.app.registration.ANEW", 0.0)
    members = sites(pooled, tmp_path / "kept")
    grid, card = grid_of(members), members["client-2"].card
    wrong = restarted(members["client-2"], agreed={**card.agreed, "seed": 9})
    grid.nodes = {**grid.nodes, 3: (b"client-2", wrong)}
    grid.tamper = in_round(1, grid, lambda: grid.nodes.update({3: (b"client-2", members["client-2"].answer)}))
    led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run")
    first, second = read_records(tmp_path / "run" / "rounds.jsonl")
    assert "seed is 9, here 3" in first.refused["client-2"]
    assert second.refused == {}
    assert second.clients == ["client-0", "client-1", "client-2"]


def test_a_site_that_was_away_is_asked_when_it_is_back(pooled: Recipe, tmp_path: Path) -> None:
    recipe = pooled.model_copy(update={"federation": pooled.federation.model_copy(update={"rounds": 3})})
    members = sites(recipe, tmp_path / "kept")
    grid = grid_of(members)
    every = dict(grid.nodes)

    def tamper(node: int, asked: Frame, content: RecordDict) -> RecordDict | None:
        number = asked.fields["brief"]["round"] if asked.kind == "train" else 0
        if (number, node) == (1, 3):
            del grid.nodes[3]
            return None
        if (number, node) == (2, 2):
            grid.nodes |= every
        return content

    grid.nodes, grid.tamper = dict(every), tamper
    events = led(recipe, grid, roster_of(members, tmp_path), tmp_path / "run", deadline=2.0)
    assert [event.client for event in events if event.kind == "back"] == ["client-2"]
    assert sorted(event.client for event in events if event.kind == "joined") == ["client-0", "client-1", "client-2"]
    clients = [record.clients for record in read_records(tmp_path / "run" / "rounds.jsonl")]
    assert clients[1:] == [["client-0", "client-1"], ["client-0", "client-1", "client-2"]]
    assert sum(node == 3 and frame.kind == "hello" for node, frame in grid.sent) == 2
