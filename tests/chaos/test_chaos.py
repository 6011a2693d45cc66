"""What a federation survives, each with a count. A few of most in every test run, all of them by `make chaos`."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import RecordDict

from florana.errors import FederationError
from florana.federation.event import Event
from florana.federation.journal import read_records
from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame
from florana.flower.app.server_app import lead
from florana.flower.app.settings import Settings
from florana.flower.app.site import Site
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.setup import execute
from florana.strategy import STRATEGIES
from tests.chaos.counts import Tally, digest, often
from tests.flower_grid import FakeGrid, lead_with_trainers, trainer_at, trainer_process
from tests.flower_sites import FAMILIES, grid_of, led, roster_of, sites, spoilt
from tests.program import begun, struck
from tests.trainer import Listener, answer_until, listening

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SMALL = {"ravan": {"heads": 2, "size": 4}}


def with_rounds(table: dict[str, Any], rounds: int, **federation: Any) -> Recipe:
    return check({**table, "federation": {**table["federation"], "rounds": rounds, **federation}}, "t")


def rounds_of(out: Path) -> int:
    path = out / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextmanager
def trainers(
    members: dict[str, Site], folder: Path, asked: Callable[[str, Frame], None] = lambda name, frame: None
) -> Iterator[Path]:
    """The sites' resident trainers, in threads of this process, each at a socket of its name; `asked` hears of what
    each is sent."""

    def answered(name: str, site: Site) -> Callable[[Frame], Frame]:
        def answer(frame: Frame) -> Frame:
            asked(name, frame)
            return site.answer(frame)

        return answer

    folder.mkdir()
    done = threading.Event()
    opened: list[tuple[Any, threading.Thread]] = []
    for name, site in members.items():
        manager = listening()
        listener: Listener = manager.__enter__()
        (folder / name).symlink_to(listener.path)
        thread = threading.Thread(target=answer_until, args=(listener, answered(name, site), done))
        thread.start()
        opened.append((manager, thread))
    try:
        yield folder
    finally:
        done.set()
        for manager, thread in opened:
            thread.join(30)
            manager.__exit__(None, None, None)


@often(1, 50)
def test_a_killed_server_goes_on_from_its_last_round(
    count: int, table: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    rounds = 4 * count  # a hundred steps are less than four rounds
    recipe = with_rounds(table, rounds)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(json.loads(recipe.model_dump_json(exclude_none=True))))
    members = sites(recipe, tmp_path / "kept")
    roster, out, rng = roster_of(list(members), tmp_path), tmp_path / "run", random.Random(7)
    kills, twice, finished = 0, [], set[tuple[int, str]]()

    def asked(name: str, frame: Frame) -> None:
        if frame.kind == "train" and (frame.fields["brief"]["round"], name) in finished:
            twice.append((frame.fields["brief"]["round"], name))

    with trainers(members, tmp_path / "sockets", asked) as sockets:
        led_by = (str(tmp_path / "recipe.toml"), str(out), roster, str(sockets))
        for _ in range(count):  # somewhere in the first rounds of this sitting, or before them
            before = rounds_of(out)
            kills += struck(lead_with_trainers, led_by, tmp_path, rng.randint(1, 100), committing=False)
            assert rounds_of(out) >= before, "a committed round is never lost"
            for path in (out / "spool").glob("round-*/trip-*/*.json"):
                finished.add((int(path.parent.parent.name[-6:]), json.loads(path.read_text())["facts"]["client"]))
        lead_with_trainers(*led_by)
    assert kills == count
    assert [record.round for record in read_records(out / "rounds.jsonl")] == list(range(1, rounds + 1))
    execute(recipe, tmp_path / "local")
    assert digest(out) == digest(tmp_path / "local")
    assert twice == []
    assert len(finished) >= count // 10
    kept = (
        f"0 rounds lost, 0 of {len(finished)} updates of unfinished rounds asked for again, the same bytes at the end"
    )
    tally("SIGKILL of the server at random steps", kills, kept)


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)


@often(1, 50)
def test_killed_clients_come_back_and_the_rounds_go_on(
    count: int, table: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    recipe = with_rounds(table, 10**6)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(json.loads(recipe.model_dump_json(exclude_none=True))))
    names, sockets, rng = ["client-0", "client-1", "client-2"], tmp_path / "sockets", random.Random(11)
    sockets.mkdir()
    roster, kills, enough = roster_of(names, tmp_path), 0, threading.Event()
    running: dict[str, BaseProcess] = {}

    def begin(name: str) -> None:
        (sockets / name).unlink(missing_ok=True)
        running[name] = begun(
            trainer_process, str(tmp_path / "recipe.toml"), name, str(sockets), str(tmp_path / "kept")
        )
        wait_until((sockets / name).is_symlink, 120)

    class EnoughError(Exception):
        pass

    def reach(name: str) -> Callable[[Frame], Frame]:
        def ask(frame: Frame) -> Frame:
            time.sleep(0.02)  # a killed trainer must not be asked a thousand times while it comes back
            try:
                return trainer_at(sockets / name)(frame)
            except (OSError, ValueError, AssertionError):
                return Frame("failure", {"reason": "its trainer is gone"})

        return ask

    records: list[Event] = []

    def show(event: Event) -> None:
        records.append(event)
        if enough.is_set() and event.kind == "committed":
            raise EnoughError

    def chaos() -> None:
        nonlocal kills
        for _ in range(count):
            time.sleep(rng.uniform(0.0, 0.3))
            name = rng.choice(names)
            running[name].kill()
            running[name].join()
            kills += 1
            begin(name)
        enough.set()

    for name in names:
        begin(name)
    thread = threading.Thread(target=chaos)
    try:
        settings = Settings(out=str(tmp_path / "run"), roster=roster, deadline=30, wait=30, base=False)
        grid = FakeGrid({n + 1: (name.encode(), reach(name)) for n, name in enumerate(names)})
        thread.start()
        with pytest.raises(EnoughError):
            lead(grid, recipe, settings, tmp_path / "run", show)
    finally:
        thread.join(600)
        for process in running.values():
            process.kill()
            process.join()
    done = read_records(tmp_path / "run" / "rounds.jsonl")
    assert kills == count
    assert all(sorted([*record.clients, *record.refused]) == names for record in done)
    lost = sum("gone" in why for record in done for why in record.refused.values())
    assert lost >= min(1, count // 10), "nobody was hit while it worked: this test must be able to fail"
    tally(
        "SIGKILL of clients while rounds run", kills, f"{len(done)} rounds committed, {lost} answers lost, none wrong"
    )


@often(2, 20)
def test_slow_clients_cost_a_deadline_and_no_more(
    count: int, table: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    recipe = check(
        {**table, "partition": {"kind": "iid", "clients": 10}, "federation": {"rounds": count, "min_clients": 7}}, "t"
    )
    members = sites(recipe, tmp_path / "kept")
    names = sorted(members)
    slow: dict[int, float] = {}
    grid = grid_of(members, slow=slow)

    def late(node: int, asked: Frame, content: RecordDict) -> RecordDict:
        slow[node] = 1e9 if node in (2, 5, 9) and asked.kind == "train" else 0.0
        return content

    grid.tamper = late
    led(recipe, grid, roster_of(names, tmp_path), tmp_path / "run", deadline=1.5)
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    assert all(len(record.clients) == 7 and len(record.refused) == 3 for record in records)
    reasons = {reason for record in records for reason in record.refused.values()}
    assert reasons == {"did not answer within 1.5 seconds"}
    tally("rounds with 30 % of clients that answer too late", count, "each ended by its deadline")


def test_a_run_without_a_quorum_ends_by_itself(table: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    recipe = with_rounds(table, 5, min_clients=3)
    members = sites(recipe, tmp_path / "kept")
    grid = grid_of(members)
    grid.tamper = lambda node, asked, content: None if node == 2 and asked.kind == "train" else content
    with pytest.raises(FederationError, match="2 usable updates of 3") as caught:
        led(recipe, grid, roster_of(sorted(members), tmp_path), tmp_path / "run", deadline=1.0)
    assert caught.value.exit_code == 4
    assert "client-1: did not answer within 1 seconds" in caught.value.why
    tally("a round without a quorum", 1, "the run ended by itself, exit code 4")


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", [*STRATEGIES])
def test_bad_updates_under_every_strategy(strategy: str, table: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    recipe = check({**table, "strategy": {"name": strategy, **SMALL.get(strategy, {})}}, "t")
    recipe = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"rounds": 1})})
    members = sites(recipe, tmp_path / "kept")
    roster = roster_of(sorted(members), tmp_path)
    without = {name: site for name, site in members.items() if name != "client-2"}
    led(recipe, grid_of(without), roster, tmp_path / "without", base=True)  # some begin at its singular vectors
    tried = 0
    for family in FAMILIES:

        def tamper(node: int, asked: Frame, content: RecordDict, family: str = family) -> RecordDict:
            if node != 3 or asked.kind != "train":
                return content
            return to_record(spoilt(from_record(content), family))

        out = tmp_path / hashlib.sha256(family.encode()).hexdigest()[:8]
        led(recipe, grid_of(members, tamper=tamper), roster, out, base=True)
        (record,) = read_records(out / "rounds.jsonl")
        assert record.refused.keys() == {"client-2"}, family
        assert digest(out) == digest(tmp_path / "without"), family
        tried += 1
    tally(f"bad updates over the wire, {strategy}", tried, "0 accepted; the aggregate is that of the others")


@often(20, 1000)
def test_old_answers_sent_again_are_never_accepted(
    count: int, table: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    rounds = max(2, count // 100)
    recipe = with_rounds(table, rounds)
    members = sites(recipe, tmp_path / "kept")
    old: list[Frame] = []
    tries = 0
    rng = random.Random(3)

    class Replaying(FakeGrid):
        """Node 3 sends its answer, and a hundred old ones with it, in the place of other messages and its own."""

        def pull_messages(self, message_ids: Any) -> Any:
            nonlocal tries
            messages = list(super().pull_messages(message_ids))
            for message in list(messages):
                frame = from_record(message.content)
                if frame.kind != "reply" or frame.fields["reply"]["client"] != "client-2":
                    continue
                while old and tries < count and len(messages) < count // (rounds - 1) + 4:
                    again = copy.deepcopy(message)
                    again.__dict__["_content"] = to_record(rng.choice(old))
                    messages.insert(rng.randrange(len(messages)), again)
                    tries += 1
                old.append(frame)
            return messages

    grid = Replaying({n + 1: (name.encode(), site.answer) for n, (name, site) in enumerate(members.items())})
    led(recipe, grid, roster_of(sorted(members), tmp_path), tmp_path / "run")
    execute(recipe, tmp_path / "local")
    without = read_records(tmp_path / "run" / "rounds.jsonl")
    assert tries >= count
    for record in without[1:]:
        good = record.clients == ["client-0", "client-1", "client-2"]
        assert good or "another request" in record.refused["client-2"], "refused, never taken for the new one"
    tally("answers of earlier rounds sent again", tries, "0 accepted")


@often(30, 300)
def test_memory_does_not_grow_with_the_rounds(count: int, table: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    recipe = with_rounds(table, count)
    members = sites(recipe, tmp_path / "kept")
    sizes: list[int] = []

    def show(event: Event) -> None:
        if event.kind == "committed":
            grid.sent.clear()
            sizes.append(psutil.Process().memory_info().rss)

    grid = grid_of(members)
    settings = Settings(
        out=str(tmp_path / "run"), roster=roster_of(sorted(members), tmp_path), deadline=30, wait=1, base=False
    )
    lead(grid, recipe, settings, tmp_path / "run", show)
    assert len(sizes) == count
    half = len(sizes) // 3
    growth = (sizes[-1] - sizes[half]) / 2**20 / (len(sizes) - half) * 100
    if count >= 300:
        assert growth <= 1.0, f"{growth:.2f} MiB per 100 rounds"
    tally("rounds in one server process", count, f"{growth:+.2f} MiB of memory per 100 rounds")
