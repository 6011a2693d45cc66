"""The parts of a federation over Flower, in one process: keys, frames, roll call, engine, trainer; what they refuse."""

from __future__ import annotations

import base64
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from florana.errors import FederationError, FloranaError, InputError, RecipeError
from florana.federation.journal import read_records
from florana.federation.keeping import keep, recall
from florana.federation.loop import Event
from florana.federation.messages import Brief, Failure, Reply
from florana.flower.briefs import brief_frame, read_brief, read_reply, reply_frame
from florana.flower.frames import Frame, receive, send
from florana.flower.keys import Certificates, approve, make_server, make_site, read_private, read_roster
from florana.flower.records import from_record, to_record
from florana.flower.server_app import lead
from florana.flower.settings import Settings, from_config, to_config
from florana.flower.site import Site, site_of
from florana.flower.trainer import answer_until, listening
from florana.recipe import Recipe
from florana.recipe_file import check
from florana.run import execute, prepare
from florana.strategy.base import Pruning
from tests.flower_grid import FakeGrid, trainer_at

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# the parts, without a network


def test_keys_are_private_and_carry_the_name(tmp_path: Path) -> None:
    private, public = make_site(tmp_path / "site", "hospital-a")
    assert private.stat().st_mode & 0o777 == 0o600
    assert read_private(tmp_path / "site") == ("hospital-a", private)
    files = make_server(tmp_path / "fed", ["fed.example.org", "10.0.0.7"])
    assert files.key.stat().st_mode & 0o077 == 0
    assert approve(files, public) == "hospital-a"
    assert list(read_roster(files.roster)) == ["hospital-a"]
    assert approve(files, public) == "hospital-a", "approving twice changes nothing"


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda f: make_site(f, "../x"), RecipeError, "no name for a site"),
        (lambda f: make_site(f / "a", "a"), RecipeError, "exists already"),
        (lambda f: make_server(f / "fed", ["x"]), RecipeError, "never replaced"),
        (lambda f: make_server(f / "new", ["a b"]), RecipeError, "neither the name nor the address"),
        (lambda f: approve(Certificates(f / "fed"), f / "a" / "a.key"), InputError, "no public key of a site"),
        (lambda f: approve(Certificates(f / "fed"), f / "impostor" / "a.pub"), RecipeError, "with another key"),
        (lambda f: approve(Certificates(f / "fed"), f / "renamed.pub"), RecipeError, "approved already, as 'a'"),
        (lambda f: read_private(f / "nobody"), InputError, "holds no key"),
        (lambda f: read_private(f / "open"), InputError, "can be read by others"),
        (lambda f: read_roster(f / "a" / "a.pub"), InputError, "cannot be read"),
    ],
)
def test_keys_refuse(act: Callable[[Path], Any], error: type[FloranaError], says: str, tmp_path: Path) -> None:
    files = make_server(tmp_path / "fed", ["x"])
    make_site(tmp_path / "a", "a")
    make_site(tmp_path / "impostor", "a")
    make_site(tmp_path / "open", "open")[0].chmod(0o644)
    approve(files, tmp_path / "a" / "a.pub")
    (tmp_path / "renamed.pub").write_bytes((tmp_path / "a" / "a.pub").read_bytes().replace(b" a\n", b" b\n"))
    with pytest.raises(error) as caught:
        act(tmp_path)
    assert says in str(caught.value) + caught.value.fix


def test_a_recipe_survives_flowers_run_configuration(recipe_table: dict[str, Any]) -> None:
    recipe = check({**recipe_table, "strategy": {"name": "best-rank", "memory": 4}}, "t")
    settings = Settings(out="/x", deadline=7.5)
    config = to_config(recipe, settings)
    assert all(isinstance(value, str | int | float | bool) for value in config.values())
    assert from_config(config) == (recipe, settings)
    assert from_config({**config, "federation.rounds": 9})[0].federation.rounds == 9
    assert from_config({**config, "train.steps": "json:null", "train.epochs": 1})[0].train.epochs == 1
    for wrong, says in (({"run.deadlin": 1}, "deadline"), ({"run.base": "yes"}, "not of type bool")):
        with pytest.raises(RecipeError, match=says):
            from_config({**config, **wrong})
    with pytest.raises(RecipeError, match="learning_rate"):
        from_config({**config, "train.learning_rat": 1.0})


BRIEF = Brief(3, "b", 2**62 + 1, b"tensors", True, ["A", "B"], ["A"], {"m": 1 / 3}, [0, 2], Pruning(2, 0.1))
REPLY = Reply("b", 3, 17, {"train_loss": 0.1}, b"tensors", 0.5)


def test_frames_carry_briefs_and_replies_bit_for_bit() -> None:
    left, right = socket.socketpair()
    with left, right:
        send(left, brief_frame(BRIEF, "run", "word"))
        sent = receive(right, 100)
        assert sent is not None
        assert read_brief(sent) == BRIEF
        send(left, reply_frame(REPLY, "word"))
        answered = receive(right, 100)
        assert answered is not None
        assert read_reply(answered, "b", "word") == REPLY
        left.shutdown(socket.SHUT_WR)
        assert receive(right, 100) is None


@pytest.mark.parametrize(
    "content",
    [b"x" * 16, b"flr1" + b"\xff" * 12, b"flr1" + b"\0\0\0\2" + b"\0" * 7 + b"\x65" + b"{}", b"flr1\0\0"],
    ids=["foreign", "huge head", "payload above the limit", "torn"],
)
def test_frames_refuse_other_bytes(content: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(content)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(ValueError):
            receive(right, 100)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "hello"}, "kind 'hello'"),
        ({"nonce": "old"}, "another request"),
        ({"reply": None}, "without the fields"),
        ({"reply": {"client": "b"}}, "without the fields"),
        ({"client": "a"}, "in the name of 'a'"),
        ({"metrics": {"x": "y"}}, "no numbers"),
        ({"metrics": [1]}, "no numbers"),
        ({"seconds": None}, "no number"),
    ],
    ids=str,
)
def test_a_reply_that_is_none_becomes_a_failure(change: dict[str, Any], says: str) -> None:
    frame = reply_frame(REPLY, "word")
    fields = {**frame.fields, **{k: v for k, v in change.items() if k in ("nonce", "reply")}}
    if inner := {k: v for k, v in change.items() if k not in ("kind", "nonce", "reply")}:
        fields["reply"] = {**fields["reply"], **inner}
    answer = read_reply(Frame(change.get("kind", frame.kind), fields, frame.payload), "b", "word")
    assert isinstance(answer, Failure)
    assert says in answer.reason


def test_what_a_client_keeps_is_found_by_run_and_round(tmp_path: Path) -> None:
    for round_ in (1, 2, 3):
        keep(tmp_path, "run", "../b", round_, {"B/m": torch.full((2,), float(round_))})
    assert float(recall(tmp_path, "run", "../b", 4)["B/m"][0]) == 3
    assert float(recall(tmp_path, "run", "../b", 3)["B/m"][0]) == 2, "round 3 is done again: as it was before"
    assert recall(tmp_path, "run", "../b", 1) == {}
    assert recall(tmp_path, "another run", "../b", 9) == {}
    assert not list(tmp_path.parent.glob("b")), "a name is no path"
    torn = next(tmp_path.rglob("round-000003*"))
    torn.write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read"):
        recall(tmp_path, "run", "../b", 4)


# the server's part with sites in this process


def sites(recipe: Recipe, folder: Path) -> dict[str, Site]:
    setup = prepare(recipe)
    return {name: site_of(recipe, setup, name, folder) for name in sorted(setup.clients)}


def grid_of(members: Mapping[str, Site], **named: Any) -> FakeGrid:
    return FakeGrid({n + 1: (name.encode(), site.answer) for n, (name, site) in enumerate(members.items())}, **named)


def roster_of(members: Mapping[str, Site], folder: Path) -> str:
    entries = {name: {"key": base64.b64encode(name.encode()).decode()} for name in members}
    (folder / "roster.json").write_text(json.dumps({"clients": entries}))
    return str(folder / "roster.json")


def led(recipe: Recipe, grid: FakeGrid, roster: str, out: Path, **named: Any) -> list[Event]:
    events: list[Event] = []
    settings = Settings(**{"out": str(out), "roster": roster, "deadline": 30, "wait": 1, "base": False, **named})
    lead(grid, recipe, settings, out, events.append)
    return events


@pytest.fixture
def pooled(unlike: dict[str, Any]) -> Recipe:
    plain = {**unlike, "federation": {"rounds": 2, "min_clients": 1}}
    plain["model"] = {**unlike["model"], "client_ranks": [2], "head": "average"}
    return check(plain, "t")


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


def test_a_site_that_does_not_fit_is_refused_and_the_others_go_on(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    card = members["client-1"].card
    strange = {**card, "agreed": {**card["agreed"], "seed": 9}}
    other = replace(members["client-1"], card=strange)
    names = {**members, "client-1": other}
    events = led(pooled, grid_of(names), roster_of(names, tmp_path), tmp_path / "run")
    refused = {event.client: event.detail for event in events if event.kind == "refused" and event.round == 0}
    assert refused.keys() == {"client-1"}
    assert "has another recipe" in refused["client-1"]
    assert "seed is 9, here 3" in refused["client-1"]
    record = read_records(tmp_path / "run" / "rounds.jsonl")[0]
    assert record.clients == ["client-0", "client-2"]
    assert "another recipe" in record.refused["client-1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": "0" * 64}, "another base model than 'client-0'"),
        ({"start": "0" * 64}, "another adapter to start from"),
        ({"client": "client-0"}, "calls itself 'client-0', but its key is that of 'client-1'"),
        ({"holds": {"train": -1, "test": 0}}, "how many rows"),
    ],
    ids=str,
)
def test_the_roll_call_refuses(change: dict[str, Any], says: str, pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    names = {**members, "client-1": replace(members["client-1"], card={**members["client-1"].card, **change})}
    events = led(pooled, grid_of(names), roster_of(names, tmp_path), tmp_path / "run")
    assert any(event.client == "client-1" and says in event.detail for event in events if event.round == 0)


def test_without_a_quorum_the_run_ends_and_says_who_is_missing(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    recipe = pooled.model_copy(update={"federation": pooled.federation.model_copy(update={"min_clients": 3})})
    two = dict(list(members.items())[:2])
    with pytest.raises(FederationError, match="2 clients were there after 1 seconds, and 3 are needed"):
        led(recipe, grid_of(two), roster_of(members, tmp_path), tmp_path / "run")


def test_stragglers_do_not_hold_up_a_round(pooled: Recipe, tmp_path: Path) -> None:
    members = sites(pooled, tmp_path / "kept")
    started = time.monotonic()
    slow = {3: 0.0}
    grid = grid_of(members, slow=slow)

    def late(node: int, asked: Frame, content: RecordDict) -> RecordDict:
        slow[3] = 60.0 if asked.kind == "train" else 0.0
        return content

    grid.tamper = late
    led(pooled, grid, roster_of(members, tmp_path), tmp_path / "run", deadline=2.0)
    assert time.monotonic() - started < 30
    for record in read_records(tmp_path / "run" / "rounds.jsonl"):
        assert record.refused == {"client-2": "did not answer within 2 seconds"}


FAMILIES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "NaN": lambda reply, t: t["A/m"].view(-1)[0].fill_(math.nan),
    "Inf": lambda reply, t: t["A/m"].view(-1)[0].fill_(math.inf),
    "x1e6": lambda reply, t: t.update({name: tensor * 1e6 for name, tensor in t.items()}),
    "x1e30": lambda reply, t: t.update({name: tensor * 1e30 + 1e30 for name, tensor in t.items()}),
    "wrong rank": lambda reply, t: t.update({"A/m": torch.cat([t["A/m"], t["A/m"]])}),
    "broadcastable shape": lambda reply, t: t.update({"A/m": t["A/m"][:, :1].clone()}),
    "missing module": lambda reply, t: t.clear(),
    "foreign module": lambda reply, t: t.update({"A/evil": t["A/m"].clone()}),
    "zero examples": lambda reply, t: reply.update(examples=0),
    "negative examples": lambda reply, t: reply.update(examples=-5),
    "huge examples": lambda reply, t: reply.update(examples=10**12),
    "NaN examples": lambda reply, t: reply.update(examples=math.nan),
    "wrong round": lambda reply, t: reply.update(round=reply["round"] + 1),
    "another's name": lambda reply, t: reply.update(client="client-0"),
    "oversize": lambda reply, t: t.update({"A/m": torch.zeros(4096, 4096)}),
}


def spoilt(frame: Frame, family: str) -> Frame:
    reply, tensors = dict(frame.fields["reply"]), load(frame.payload)
    first = next(name for name in tensors if not name.startswith("extra/"))  # of A, B or core, what the method sends
    view = {"A/m": tensors.pop(first)}
    FAMILIES[family](reply, view)
    tensors |= {first if n == "A/m" else n: t for n, t in view.items()}
    return Frame("reply", {**frame.fields, "reply": reply}, save({n: t.contiguous() for n, t in tensors.items()}))


@pytest.mark.parametrize("family", [*FAMILIES, "an old answer again", "not a message", "the wrong word"])
def test_a_bad_update_over_the_wire_is_refused_and_the_round_is_that_of_the_others(
    family: str, pooled: Recipe, tmp_path: Path
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
    without = {k: v for k, v in members.items() if k != "client-2"}
    if family != "an old answer again":  # its first answer was a good one
        led(pooled, grid_of(without), roster_of(members, tmp_path), tmp_path / "without")
        name = "adapter/adapter_model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_the_trainer_answers_its_own_user_and_ends_when_told(tmp_path: Path) -> None:
    done = threading.Event()
    with listening() as listener:
        assert listener.path.parent.stat().st_mode & 0o777 == 0o700
        thread = threading.Thread(
            target=answer_until, args=(listener, lambda f: Frame("hello", f.fields, f.payload), done)
        )
        thread.start()
        ask = trainer_at(listener.path)
        assert ask(Frame("x", {"a": 1}, b"y")) == Frame("hello", {"a": 1}, b"y")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(str(listener.path))
            channel.sendall(b"GET / HTTP/1.1\r\n\r\n")
            answer = receive(channel, 100)
        assert answer is not None
        assert answer.kind == "failure"
        assert ask(Frame("x")) == Frame("hello")
        done.set()
        thread.join(5)
        assert not thread.is_alive()
    assert not listener.path.exists()
