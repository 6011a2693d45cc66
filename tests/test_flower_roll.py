"""The roll call: who takes part, who is refused and why, and that one who differs ends nothing for the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import RecordDict

from florana.errors import FederationError
from florana.federation.journal import read_records
from florana.federation.loop import Event
from florana.flower.frames import Frame
from florana.flower.records import from_record, to_record
from florana.recipe import Recipe
from tests.flower_sites import grid_of, led, roster_of, sites

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def saying(who: int, change: Callable[[dict[str, Any]], object]) -> Callable[..., RecordDict]:
    """A node that says something else at the roll call than it should."""

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
