"""The server's part of a run with sites in this process: rounds, deadlines, and updates that must not get in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from florana.federation.journal import read_records
from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame
from florana.recipe.schema import Recipe
from florana.runs.setup import execute
from tests.flower_sites import FAMILIES, grid_of, led, roster_of, sites, spoilt

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("base", [True, False], ids=["base at the server", "no base at the server"])
def test_the_server_leads_with_and_without_the_base_model(pooled: Recipe, base: bool, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    led(pooled, grid_of(members), roster_of(members, tmp_path), tmp_path / "run", base=base)
    execute(pooled, tmp_path / "local")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    assert all(("global" in record.eval) == base for record in records)
    assert [r.bytes_up for r in records] == [r.bytes_up for r in read_records(tmp_path / "local" / "rounds.jsonl")]


def test_an_answer_that_is_begun_and_never_ended_holds_up_nobody(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    grid = grid_of(members)
    never, pull = threading.Event(), grid.pull_messages
    waited: list[int] = []

    def pulling(message_ids: Iterable[str]) -> Iterable[Message]:
        messages = list(pull(message_ids))
        if any(m.metadata.src_node_id == 3 and from_record(m.content).kind == "reply" for m in messages):
            never.wait()  # as Flower's own grid does until all objects of the message are there
            waited.append(3)
        return messages

    grid.pull_messages = pulling  # type: ignore[method-assign]
    led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run", deadline=3.0)
    assert waited == [], "the run has ended, and that answer has not"
    never.set()
    for record in read_records(tmp_path / "run" / "rounds.jsonl"):
        assert record.clients == ["client-0", "client-1"]
        assert record.refused == {"client-2": "did not answer within 3 seconds"}


def test_stragglers_do_not_hold_up_a_round(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    slow = {3: 0.0}
    grid = grid_of(members, slow=slow)

    def late(node: int, asked: Frame, content: RecordDict) -> RecordDict:
        slow[3] = 1e9 if asked.kind == "train" else 0.0
        return content

    grid.tamper = late
    led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run", deadline=2.0)
    for record in read_records(tmp_path / "run" / "rounds.jsonl"):
        assert record.refused == {"client-2": "did not answer within 2 seconds"}


@pytest.fixture(scope="module")
def of_the_others(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], bytes]:
    """The adapter that the others make without client-2."""
    made: dict[str, bytes] = {}

    def adapter(recipe: Recipe) -> bytes:
        if recipe.model_dump_json() not in made:
            place = tmp_path_factory.mktemp("without")
            members = sites(recipe, place / "kept")
            without = {k: v for k, v in members.items() if k != "client-2"}
            led(recipe, grid_of(without), roster_of(members, place), place / "run")
            made[recipe.model_dump_json()] = (place / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
        return made[recipe.model_dump_json()]

    return adapter


@pytest.mark.parametrize("family", [*FAMILIES, "an old answer again", "not a message", "the wrong word"])
def test_a_bad_update_over_the_wire_is_refused_and_the_round_is_that_of_the_others(
    family: str, pooled: Recipe, of_the_others: Callable[[Recipe], bytes], tmp_path: Path
) -> None:
    members, old = sites(pooled, tmp_path / "kept"), []

    def tamper(node: int, asked: Frame, content: RecordDict) -> RecordDict:
        if node != 3 or asked.kind != "train":
            return content
        frame = from_record(content)
        old.append(frame)
        if family == "not a message":
            return RecordDict({"arrays": ArrayRecord(), "florana": ConfigRecord({"head": "[]"})})
        if family == "an old answer again":
            return to_record(old[0]) if len(old) > 1 else content
        if family == "the wrong word":
            return to_record(Frame("reply", {**frame.fields, "nonce": "0" * 32}, frame.payload))
        return to_record(spoilt(frame, family))

    led(pooled, grid_of(members, tamper=tamper), roster_of(members, tmp_path), tmp_path / "run")
    record = read_records(tmp_path / "run" / "rounds.jsonl")[-1]
    assert record.clients == ["client-0", "client-1"], family
    assert record.refused.keys() == {"client-2"}
    if family != "an old answer again":  # its first answer was a good one
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == of_the_others(pooled)


def test_a_site_answers_to_its_own_name_and_to_requests_it_knows(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    grid = grid_of(members)
    led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run")
    asked = next(frame for node, frame in grid.sent if node == 2 and frame.kind == "train")
    answer = members["client-0"].answer(asked)
    assert (answer.kind, answer.fields["reason"]) == ("failure", "is 'client-0', but was asked as 'client-1'")
    answer = members["client-0"].answer(Frame("erase"))
    assert (answer.kind, answer.fields["reason"]) == ("failure", "does not know requests of kind 'erase'")
