"""The parts of a federation over Flower, in one process: keys, frames, records, trainer; what they refuse."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

from florana.errors import FloranaError, InputError, RecipeError
from florana.federation.client_state import keep, recall
from florana.federation.messages import Brief, Failure, Reply, Step
from florana.flower.app.client_app import app
from florana.flower.app.codec import (
    brief_frame,
    failure_frame,
    read_brief,
    read_reply,
    read_sealed,
    reply_frame,
    sealed_frame,
    step_in,
)
from florana.flower.app.export import export
from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame, from_head
from florana.flower.app.settings import Settings, from_config, to_config
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.keys import Certificates, make_site, read_private
from florana.flower.deploy.live_roster import LiveRoster
from florana.flower.deploy.roster import approve, read_roster, revoke
from florana.recipe.load import check
from florana.secure.session_keys import Refused
from florana.strategy.base import Pruning
from tests.flower_fake import identify

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def test_keys_are_private_and_carry_the_name(tmp_path: Path) -> None:
    private, public = make_site(tmp_path / "site", "hospital-a")
    assert private.stat().st_mode & 0o777 == 0o600
    assert read_private(tmp_path / "site") == ("hospital-a", private)
    files = make_server(tmp_path / "fed", ["fed.example.org", "10.0.0.7"])
    assert files.key.stat().st_mode & 0o077 == 0
    assert approve(files, public) == ("hospital-a", False)
    assert list(read_roster(files.roster).keys) == ["hospital-a"]
    assert approve(files, public) == ("hospital-a", False), "approving twice changes nothing"


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
    recipe = check({**recipe_table, "strategy": {"name": "best-rank", "carry_rank": 4}}, "t")
    settings = Settings(out="/x", deadline=7.5)
    config = to_config(recipe, settings)
    assert all(isinstance(value, str | int | float | bool) for value in config.values())
    assert from_config(config) == (recipe, settings)
    unnamed = check({**recipe_table, "threads": None}, "t")
    assert from_config(to_config(unnamed, settings)) == (unnamed, settings)
    assert from_config({**config, "federation.rounds": 9})[0].federation.rounds == 9
    assert from_config({**config, "train.steps": "json:null", "train.epochs": 1})[0].train.epochs == 1
    for wrong, says in (({"run.deadlin": 1}, "deadline"), ({"run.base": "yes"}, "not of type bool")):
        with pytest.raises(RecipeError, match=says):
            from_config({**config, **wrong})
    with pytest.raises(RecipeError, match="learning_rate"):
        from_config({**config, "train.learning_rat": 1.0})


BRIEF = Brief(3, "b", 2**62 + 1, b"tensors", True, ["A", "B"], ["A"], {"m": 1 / 3}, [0, 2], Pruning(2, 0.1))
REPLY = Reply("b", 3, 17, {"train_loss": 0.1}, b"tensors", 0.5)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("", "flora-na-on-sentences-csv"),
        ("florana demo: topics of the Python standard library", "florana-demo-topics-of-the"),
        ("3 hospitals, eight rounds", "florana-3-hospitals-eight-rounds"),
        ("Krankenhäuser", "krankenh-user"),
        ("???", "app"),
        ("x" * 40, "x" * 32),
        ("9" * 40, "florana"),
    ],
)
def test_an_exported_app_has_a_name_that_flower_takes(
    title: str, name: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = check({**recipe_table, "title": title, "strategy": {"name": "flora-na"}}, "t")
    project = tomllib.loads((export(recipe, tmp_path / "app") / "pyproject.toml").read_text())["project"]
    assert project["name"] == name
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name)


def test_what_florana_did_not_write_is_no_frame() -> None:
    """Each part that a message must have, missing or another's."""
    whole = to_record(Frame("hello", {"word": "x"}, b"tensors"))
    config, arrays = whole["florana"], whole["tensors"]
    assert isinstance(arrays, ArrayRecord)
    payload = arrays["payload"]
    foreign = Array(dtype="uint8", shape=(7,), stype="numpy.ndarray", data=b"tensors")
    other = "that florana did not write"
    for parts, message in (
        ({"tensors": arrays}, other),
        ({"florana": config}, other),
        ({"florana": ConfigRecord({"head": 3}), "tensors": arrays}, other),
        ({"florana": ConfigRecord({}), "tensors": arrays}, other),
        ({"florana": config, "tensors": ArrayRecord({"payload": payload, "more": payload})}, "other arrays"),
        ({"florana": config, "tensors": ArrayRecord({})}, "other arrays"),
        ({"florana": config, "tensors": ArrayRecord({"payload": foreign})}, "other arrays"),
    ):
        with pytest.raises(ValueError, match=message):
            from_record(RecordDict(dict(parts)))
    for head in ("[]", "{}", '{"kind": 3, "fields": {}}', '{"kind": "hello"}', '{"kind": "hello", "fields": []}', "{"):
        with pytest.raises(ValueError, match=r"a message w|Expecting"):
            from_record(RecordDict({"florana": ConfigRecord({"head": head}), "tensors": arrays}))


def test_frames_carry_briefs_and_replies_bit_for_bit() -> None:
    sent = from_record(to_record(brief_frame(BRIEF, "run", "word", "card")))
    assert read_brief(sent) == BRIEF
    answered = from_record(to_record(reply_frame(REPLY, "word")))
    assert read_reply(answered, "b", "word") == REPLY


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("[]", "without a kind"),
        ('{"kind": 3}', "without a kind"),
        ('{"kind": "x"}', "no table"),
        ('{"kind": "x", "fields": [1]}', "no table"),
        ("{", "Expecting property name"),
    ],
)
def test_frames_refuse_other_texts(head: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_head(head, b"")


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


@pytest.mark.parametrize(
    ("frame", "says", "spent"),
    [
        (failure_frame("no disk"), "no disk", False),
        (failure_frame("no budget", spent=True), "no budget", True),
        (Frame("failure", {"reason": "x" * 2000, "spent": "yes"}), "x" * 1000, False),
        (Frame("failure"), "failed without a reason", False),
        (Frame("changed"), "is not as it was at registration", False),
    ],
    ids=["failure", "spent", "long", "bare", "changed"],
)
@pytest.mark.parametrize("read", [read_reply, read_sealed])
def test_a_client_that_could_not_answer_is_told_with_its_reason(
    read: Callable[..., Any], frame: Frame, says: str, spent: bool
) -> None:
    answer = read(frame, "b", "word")
    assert isinstance(answer, Failure)
    assert (answer.client, answer.spent) == ("b", spent)
    assert answer.reason.startswith(says)
    assert len(answer.reason) <= 1000


def test_an_answer_to_a_step_of_a_secure_sum_is_one_to_just_this_step() -> None:
    step = Step({"keys": "k"}, b"tensors")
    assert read_sealed(sealed_frame(step, "run", "word"), "b", "word") == step
    for frame, says in (
        (sealed_frame(step, "run", "old"), "another step"),
        (Frame("sealed", {"nonce": "word"}, b""), "another step"),
        (Frame("sealed", {"nonce": "word", "step": [1]}, b""), "another step"),
        (reply_frame(REPLY, "word"), "unasked"),
        (Frame("hello", {"nonce": "word"}), "kind 'hello'"),
    ):
        answer = read_sealed(frame, "b", "word")
        assert isinstance(answer, Failure)
        assert says in answer.reason
    for fields in ({}, {"step": "shares"}, {"step": None}):
        with pytest.raises(Refused, match="a step of a secure sum that is none"):
            step_in(Frame("sealed", fields))


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


def test_a_node_of_no_simulation_says_so() -> None:
    identify()
    asked = Message(to_record(Frame("hello")), dst_node_id=1, message_type=MessageType.QUERY)
    answer = from_record(app(asked, Context(1, 1, {}, RecordDict(), {})).content)
    assert (answer.kind, answer.fields["reason"][:26]) == ("failure", "it is no node of a simulat")


def test_a_site_is_revoked_and_its_name_is_free_for_a_new_key(tmp_path: Path) -> None:
    files = make_server(tmp_path / "fed", ["localhost"])
    for name in ("a", "b"):
        approve(files, make_site(tmp_path / name, name)[1], 7)
    revoke(files, "a")
    assert list(read_roster(files.roster).keys) == ["b"]
    assert read_roster(files.roster).rows == {"b": 7}
    with pytest.raises(RecipeError, match="'a' is not on the roster"):
        revoke(files, "a")
    assert approve(files, make_site(tmp_path / "new", "a")[1]) == ("a", False)


def test_a_server_lets_in_who_is_on_the_roster_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Removed or with another key: none; added: not before the next start; unreadable: as it was; gone: nobody."""
    files = make_server(tmp_path / "fed", ["localhost"])
    for name in ("a", "b"):
        approve(files, make_site(tmp_path / name, name)[1])
    began = read_roster(files.roster).keys
    live = LiveRoster(files.roster, read_roster(files.roster))
    assert dict(live) == {key: name for name, key in began.items()}
    revoke(files, "a")
    assert dict(live) == {began["b"]: "b"}
    assert "a was taken off the roster" in caplog.text
    approve(files, make_site(tmp_path / "new", "a")[1])
    approve(files, make_site(tmp_path / "c", "c")[1])
    assert dict(live) == {began["b"]: "b"}
    whole = files.roster.read_bytes()
    files.roster.write_text("{")
    assert dict(live) == {began["b"]: "b"}
    files.roster.write_bytes(whole)
    assert len(live) == 1
    files.roster.unlink()
    assert began["b"] not in live
