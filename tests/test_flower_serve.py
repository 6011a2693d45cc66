"""What `florana serve` and `florana join` refuse before anything starts, and what they say of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

import florana.flower.deploy.join as joining
import florana.flower.deploy.serve as serving
from florana.errors import FederationError, InputError
from florana.federation.event import Event
from florana.federation.messages import Brief, Reply, pack
from florana.flower.app.codec import brief_frame
from florana.flower.app.farewell import ended_frame
from florana.flower.app.frames import Frame
from florana.flower.app.settings import Settings
from florana.flower.app.site import Site, site_of
from florana.flower.app.site_card import digest
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.invitation import Invitation, hosts_of, invite, read_invitation, site_recipe
from florana.flower.deploy.join import join, told
from florana.flower.deploy.keys import Certificates, make_site, read_certificate
from florana.flower.deploy.roster import approve
from florana.flower.deploy.serve import serve
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.report.page import write_report
from florana.runs.prepared import prepare
from florana.runs.run_folder import held, locked
from florana.runs.setup import execute
from tests.deployment import free_port
from tests.flower_sites import sites

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@contextmanager
def elsewhere(lock: Any) -> Iterator[None]:
    """The lock is held by somebody else: another thread here, as it would be another process."""
    took, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            took.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert took.wait(10)
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture
def fed(tmp_path: Path) -> Certificates:
    files = make_server(tmp_path / "fed", ["127.0.0.1"])
    approve(files, make_site(tmp_path / "a", "a")[1])
    return files


@pytest.fixture
def recipe(recipe_table: dict[str, Any]) -> Recipe:
    return check({**recipe_table, "federation": {"rounds": 2, "min_clients": 1}}, "t")


def begin(recipe: Recipe, fed: Certificates, out: Path, **named: Any) -> list[Event]:
    events: list[Event] = []
    settings = Settings(wait=0.1, deadline=1, base=False)
    with pytest.raises(FederationError) as refused:
        serve(recipe, fed, out, settings, host="127.0.0.1", port=free_port(), show=events.append, **named)
    events.append(Event("refused", 0, detail=f"{refused.value.what}; {refused.value.why}; {refused.value.fix}"))
    return events


def test_a_second_server_on_a_live_run_folder_is_refused(recipe: Recipe, fed: Certificates, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with elsewhere(locked(out)):
        (event,) = begin(recipe, fed, out, resume=True)
    assert f"another florana is working in {out}; ; wait for it, or name another folder" in event.detail


def test_a_second_server_of_an_operators_folder_is_refused(recipe: Recipe, fed: Certificates, tmp_path: Path) -> None:
    (fed.folder / "flower").mkdir()
    with elsewhere(held(fed.folder / "flower" / "guard", FederationError("taken"))):
        (event,) = begin(recipe, fed, tmp_path / "run")
    assert "another florana serves from" in event.detail
    assert not (tmp_path / "run").exists()


def test_a_second_join_of_a_sites_folder_is_refused(recipe: Recipe, fed: Certificates, tmp_path: Path) -> None:
    (tmp_path / "a" / "flower").mkdir()
    there = Invitation(tmp_path, "127.0.0.1", 1, fed.authority, tmp_path / "recipe.toml")
    with (
        elsewhere(held(tmp_path / "a" / "flower" / "lock", FederationError("taken"))),
        pytest.raises(FederationError, match="another florana takes part from"),
    ):
        join(recipe, there, tmp_path / "a", None, done=threading.Event())


def test_a_resumed_run_that_is_not_there_begins_and_says_so(recipe: Recipe, fed: Certificates, tmp_path: Path) -> None:
    events = begin(recipe, fed, tmp_path / "deep" / "run", resume=True)
    assert events[0].kind == "repaired"
    assert "holds no committed round: the run begins with the first" in events[0].detail
    assert "0 clients were there after 0.1 seconds" in events[-1].detail


def test_a_run_folder_that_cannot_be_made_is_refused(recipe: Recipe, fed: Certificates, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (event,) = begin(recipe, fed, tmp_path / "file" / "run")
    assert "the run folder could not be made" in event.detail
    assert "--out" in event.detail or "disk" in event.detail


def test_a_port_in_use_leaves_no_run_folder(
    recipe: Recipe, fed: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: Any) -> Any:
        raise FederationError("the port cannot be served")

    monkeypatch.setattr(serving, "open_door", taken)
    (event,) = begin(recipe, fed, tmp_path / "run")
    assert "cannot be served" in event.detail
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        (["10.0.0.7"], "10.0.0.7"),
        (["fed.example.org", "10.0.0.7"], "fed.example.org"),
        (["10.0.0.7", "fed.example.org"], "10.0.0.7"),
        (["2001:db8::7"], "2001:db8::7"),
        (["localhost"], "localhost"),
    ],
)
def test_an_invitation_names_the_host_that_was_named_first(hosts: list[str], first: str, tmp_path: Path) -> None:
    files = make_server(tmp_path / "fed", hosts)
    names = hosts_of(read_certificate(files.certificate))
    assert names[: len(hosts)] == hosts
    assert {"localhost", "127.0.0.1"} <= set(names)
    assert names[0] == first


def test_the_command_invites_to_the_address_that_the_keys_were_made_for(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    import tomli_w

    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe_table))
    files = make_server(tmp_path / "fed", ["10.0.0.7"])
    command = ["flower", "invite", "recipe.toml", "--fed", str(files.folder), "--out", "invitation", "--no-base"]
    done = subprocess.run(
        [sys.executable, "-m", "florana", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert read_invitation(tmp_path / "invitation").address == "10.0.0.7:8443"
    invite(tmp_path / "recipe.toml", files, "127.0.0.1", 1, tmp_path / "own")


def test_a_base_model_by_a_path_that_is_not_at_the_site_is_asked_for_by_its_option(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    import tomli_w

    recipe_table["model"]["base"] = "../models/tiny"
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe_table))
    files = make_server(tmp_path / "fed", ["localhost"])
    read = read_invitation(invite(tmp_path / "recipe.toml", files, "localhost", 1, tmp_path / "far" / "invitation"))
    with pytest.raises(InputError, match="--base FOLDER") as caught:
        site_recipe(read, None, None, [])
    assert str(tmp_path / "far" / "models" / "tiny") in str(caught.value)
    assert site_recipe(read, "here/tiny", None, []).model.base == "here/tiny"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_class_counts_leave_a_site_only_if_it_says_so(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["partition"] = {"kind": "iid", "clients": 2}
    recipe_table["federation"] = {"rounds": 1}
    recipe = check(recipe_table, "t")
    setup = prepare(recipe)
    open_ = site_of(recipe, setup, "client-0", tmp_path / "kept").card.holds
    quiet = site_of(recipe, setup, "client-0", tmp_path / "kept", counts=False).card
    assert open_.per_label is not None
    assert sum(open_.per_label) == open_.train
    assert quiet.holds.per_label is None
    assert quiet.holds.train == open_.train
    assert "per_label" not in json.dumps(quiet.model_dump(mode="json", exclude_none=True))
    execute(recipe, tmp_path / "run", setup=setup)
    facts = json.loads((tmp_path / "run" / "setup.json").read_text())
    del facts["clients"]["client-1"]["per_label"]
    (tmp_path / "run" / "setup.json").write_text(json.dumps(facts))
    assert "client-1" in write_report([tmp_path / "run"], tmp_path / "r.html").read_text()


def test_a_site_with_other_data_than_at_the_roll_call_gives_no_kept_answer(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe_table["partition"] = {"kind": "iid", "clients": 2}
    recipe_table["federation"] = {"rounds": 2}
    site = sites(check(recipe_table, "t"), tmp_path / "kept")["client-0"]
    made = replace(site, fit=lambda brief, memory: (Reply("client-0", 1, 3, {}, b"t", 0.1), {}))
    brief = Brief(1, "client-0", 1, b"p", False, ["A"], ["A"], {})
    kept, said = tmp_path / "answer", list[str]()

    def ask(asked: Site, word: str) -> Frame:
        return told(asked, brief_frame(brief, "run", word, digest(site.card)), kept, said.append)

    assert ask(made, "a").fields["nonce"] == "a"
    never = replace(site, fit=lambda brief, memory: pytest.fail("it was trained again"))
    assert ask(never, "b").fields["nonce"] == "b"
    other = site.card.model_copy(update={"torch": "another"})
    assert ask(replace(never, card=other), "c").kind == "changed"
    assert said == ["client-0: round 1"] * 3


@pytest.mark.parametrize("stay", [False, True])
def test_a_site_works_for_one_run_until_it_is_started_again(
    stay: bool, recipe: Recipe, fed: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run's request and its last word are refused and written down; `--stay` answers all."""
    make_site(tmp_path / "site", "client-0")
    answers = list[tuple[str, str, str]]()

    def line(
        invitation: Invitation, key: Any, asked: Any, done: Any, say: Any, ends: frozenset[str], most: int
    ) -> None:
        card = site_of(recipe, prepare(recipe), "client-0", tmp_path / "other", counts=False).card
        brief = Brief(1, "client-0", 1, pack(first), False, ["A", "B"], ["A", "B"], first.scalings)
        for kind, run in [
            ("other", "early"),
            ("train", "a"),
            ("train", "b"),
            ("end", "b"),
            ("train", "a"),
            ("end", "a"),
        ]:
            named = digest(card) if kind == "train" else "of another"
            frame = ended_frame(run, 1, None) if kind == "end" else brief_frame(brief, run, kind, named)
            made = asked(frame)
            answers.append((kind, run, made.kind))

    first = site_of(recipe, prepare(recipe), "client-0", tmp_path / "first").start
    monkeypatch.setattr(joining, "attend", line)
    said = list[str]()
    there = Invitation(tmp_path, "127.0.0.1", 1, fed.authority, tmp_path / "recipe.toml")
    join(recipe, there, tmp_path / "site", None, done=threading.Event(), stay=stay, say=said.append)
    b = "reply" if stay else "failure"
    assert answers == [
        ("other", "early", "changed"),
        ("train", "a", "reply"),
        ("train", "b", b),
        ("end", "b", "ended" if stay else "failure"),
        ("train", "a", "reply"),
        ("end", "a", "ended"),
    ]
    refused = [line for line in said if "takes part in the run a, and was asked by the run b" in line]
    assert len(refused) == (0 if stay else 2)
    log = (tmp_path / "site" / "audit.jsonl").read_text()
    assert log.count("was asked by the run b") == len(refused)
