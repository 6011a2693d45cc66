"""The live page: what it says of a run at every stage, who may read it, and that it writes nothing."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from florana.errors import FederationError, InputError
from florana.recipe.load import check
from florana.report.live import live_of
from florana.report.live_study import live_study_of
from florana.report.watch import page_of, watching
from florana.runs.run_folder import PROGRESS, locked
from florana.runs.setup import execute
from florana.study.grid import plan_of
from florana.study.runner import execute_study
from tests.hostile import STRINGS, forbidden
from tests.program import florana


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, sentences: Path) -> Path:
    table: dict[str, Any] = {
        "title": "a <b>title</b>",
        "task": "sequence-classification",
        "model": {"base": str(tiny_bert), "target_modules": ["query"], "rank": 2, "alpha": 4},
        "data": {"train": str(sentences), "label": "label", "max_length": 16},
        "partition": {"kind": "iid", "clients": 2},
        "train": {"steps": 1, "batch_size": 4},
        "federation": {"rounds": 3},
        "strategy": {"name": "fedit"},
    }
    folder = tmp_path_factory.mktemp("runs") / "one"
    execute(check(table, "t"), folder)
    for place, name in enumerate(("round-000002", "round-000003")):
        os.utime(folder / "checkpoint" / name / "state.json", (100 + 40 * place, 100 + 40 * place))
    return folder


def stage(done: Path, folder: Path, rounds: int) -> Path:
    """The run as it was after so many rounds."""
    shutil.copytree(done, folder)
    lines = (done / "rounds.jsonl").read_text().splitlines(keepends=True)
    (folder / "rounds.jsonl").write_text("".join(lines[:rounds]))
    return folder


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[int]:
    with watching(folder, "127.0.0.1", port, 7) as (server, address):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert address == f"http://127.0.0.1:{server.server_address[1]}/"
        yield server.server_address[1]
        server.shutdown()


def asked(port: int, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_a_run_that_goes_on_and_one_that_was_killed(done: Path, tmp_path: Path) -> None:
    folder = stage(done, tmp_path / "run", 2)
    with locked(folder):
        live = live_of(folder, 7)
        page = page_of(folder, 7)
    assert (live.round, live.rounds, live.running, list(live.answered)) == (2, 3, True, ["client-0", "client-1"])
    assert live.seconds_left == 40.0  # one round, at the pace of the last one
    assert not live.stopped
    killed = page_of(folder, 7)
    assert "Stopped after 2 of 3 rounds: no florana of this machine is at work in the folder" in killed
    assert "with --resume" in killed
    assert "is running" not in killed
    assert live_of(folder, 7).seconds_left is None
    assert not live_of(done, 7).stopped
    assert "Round 3 of 3 is running" in page
    assert "2 clients counted (client-0, client-1), none was refused or missing" in page
    assert '<meta http-equiv="refresh" content="7">' in page
    assert "a &lt;b&gt;title&lt;/b&gt;" in page
    assert "<b>title" not in page


def test_a_run_that_has_ended_and_one_that_begins(done: Path, tmp_path: Path) -> None:
    assert "The run has ended after 3 rounds" in page_of(done, 7)
    folder = stage(done, tmp_path / "run", 0)
    with locked(folder):
        page = page_of(folder, 7)
    assert "Round 1 of 3 is running" in page
    assert "No round is committed yet" in page


def test_a_federation_says_who_is_there_and_why_not(done: Path, tmp_path: Path) -> None:
    folder = stage(done, tmp_path / "run", 1)
    events = [
        {"kind": "joined", "round": 0, "client": "old", "detail": "before the last round"},
        {"kind": "committed", "round": 1, "client": "", "detail": ""},
        {"kind": "round", "round": 2, "client": "", "detail": "2"},
        {"kind": "reply", "round": 2, "client": "a", "detail": ""},
        {"kind": "refused", "round": 2, "client": "b", "detail": "did not <i>answer</i>"},
    ]
    text = "".join(json.dumps({"time": 1.0, **event}) + "\n" for event in events)
    (folder / PROGRESS).write_text('half a line"}\n' + text + '{"not yet')
    assert live_of(folder, 7).now == ["round 2: 2 clients are asked", "reply a", "refused b did not <i>answer</i>"]
    assert "refused b did not &lt;i&gt;answer&lt;/i&gt;" in page_of(folder, 7)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / PROGRESS).write_text(json.dumps({"time": 1.0, **events[0]}) + "\n")
    with locked(fresh):
        assert "Waiting for the sites" in page_of(fresh, 7)
    assert "Stopped after 0 rounds" in page_of(fresh, 7)


@pytest.mark.parametrize("text", STRINGS[:40])
def test_nothing_that_a_site_says_reaches_the_page_as_it_is(text: str, done: Path, tmp_path: Path) -> None:
    folder = stage(done, tmp_path / "run", 1)
    event = {"time": 1.0, "kind": "refused", "round": 2, "client": text, "detail": text}
    (folder / PROGRESS).write_text(json.dumps(event) + "\n")
    (line,) = live_of(folder, 7).now
    assert not forbidden(line.replace("\n", " "))


def test_the_page_follows_the_run_and_the_folder_stays_as_it_is(done: Path, tmp_path: Path) -> None:
    folder = stage(done, tmp_path / "run", 1)
    with served(folder) as port:
        with locked(folder):
            before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
            assert "Round 2 of 3 is running" in asked(port)[1]
            assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
        assert "Stopped after 1 of 3 rounds" in asked(port)[1]
        (folder / "rounds.jsonl").write_bytes((done / "rounds.jsonl").read_bytes())
        assert "The run has ended" in asked(port)[1]
        shutil.move(folder / "recipe.toml", folder / "gone")
        status, text, _ = asked(port)
        assert (status, "Traceback" in text) == (503, False)


def test_who_may_read_it(done: Path) -> None:
    with served(done) as port:
        status, page, headers = asked(port)
        assert (status, headers["Cache-Control"], headers["X-Content-Type-Options"]) == (200, "no-store", "nosniff")
        assert "<script" not in page
        assert asked(port, method="HEAD")[:2] == (200, "")
        assert [asked(port, path)[0] for path in ("/rounds.jsonl", "/../recipe.toml", "/?x")] == [404] * 3
        assert [asked(port, host=host)[0] for host in ("evil.example", f"evil.example:{port}", "")] == [403] * 3
        for host in (f"localhost:{port}", "localhost:9", "127.0.0.1", "[::1]:80", "192.0.2.7:8080"):  # a tunnel too
            assert asked(port, host=host)[0] == 200
        for host in ("localhost.evil.example", "127.0.0.1.evil.example", "evil.example@localhost", "2130706433"):
            assert asked(port, host=host)[0] == 403
        assert [asked(port, method=method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [501] * 4
        with pytest.raises(FederationError, match="cannot listen"), watching(done, "127.0.0.1", port, 5):
            pass


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"), watching(tmp_path, "127.0.0.1", 0, 5):
        pass
    done = florana("watch", str(tmp_path))
    assert done.returncode == 3
    assert "is no run folder" in done.stderr


@pytest.fixture
def study(done: Path, tmp_path: Path) -> Path:
    """One run that is done, one in its second round, one that failed, one that waits."""
    folder = tmp_path / "a study"
    cells = [f"as-recipe/seed-{seed}/{method}" for seed in (0, 1) for method in ("fedit", "mine_<b>.py")]
    for cell, rounds in zip(cells, (3, 1), strict=False):
        stage(done, folder / "runs" / cell, rounds)
    (folder / "failures.json").write_text(json.dumps({cells[2]: "the <i>loss</i>\x1b[2J became nan"}))
    begun = {"cells": cells, "rounds": 3, "left": 9, "time": 1000.0}
    (folder / "progress.json").write_text(json.dumps(begun))
    return folder


def test_a_study_shows_each_of_its_runs_and_the_time_left(study: Path) -> None:
    with locked(study):
        live = live_study_of(study, 5, now=1060.0)
    assert not live.stopped
    assert [(run.rounds, run.score is not None, bool(run.why)) for run in live.runs] == [
        (3, True, False), (1, True, False), (0, False, True), (0, False, False)
    ]  # fmt: skip
    assert live.done == 2
    assert live.score == "accuracy"
    assert live.seconds_left == pytest.approx(60.0 / 4 * 5)  # four of nine rounds were made, five are left to do
    with served(study) as port:
        assert "<b>Stopped with 2 of 4 runs done: no florana" in asked(port)[1]
        with locked(study):
            page = asked(port)[1]
    assert "<b>2 of 4 runs are done</b>" in page
    assert "seed-0/mine_&lt;b&gt;.py" in page
    assert "failed: the &lt;i&gt;loss&lt;/i&gt;" in page
    assert "\x1b" not in page
    assert "<script" not in page
    for cell in live.runs[1:]:
        stage_of = (
            study / "runs" / str(json.loads((study / "progress.json").read_text())["cells"][live.runs.index(cell)])
        )
        shutil.rmtree(stage_of, ignore_errors=True)
        shutil.copytree(study / "runs" / "as-recipe" / "seed-0" / "fedit", stage_of)
    assert "All 4 runs are done" in page_of(study, 5)


@pytest.mark.parametrize(
    "content",
    [
        "[]", "{", '{"cells": 3}', '{"cells": ["../x"], "rounds": 1, "left": 1, "time": 1}',
        '{"cells": ["/etc"], "rounds": 1, "left": 1, "time": 1}',
        '{"cells": [], "rounds": Infinity, "left": 1, "time": 1}',
    ],
)  # fmt: skip
def test_a_studys_progress_that_is_none_is_named(content: str, study: Path) -> None:
    (study / "progress.json").write_text(content)
    with pytest.raises(InputError, match=r"progress\.json"):
        live_study_of(study, 5)


def test_a_study_that_runs_can_be_watched(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["federation"] = {"rounds": 1}
    recipe_table["study"] = {"methods": ["fedit"], "controls": [], "seeds": 1, "fixed_updates_rounds": []}
    seen: list[int] = []
    plan = plan_of(check(recipe_table, "t"))
    execute_study(plan, tmp_path, 1, lambda count, name: seen.append(live_study_of(tmp_path, 5).done))
    assert seen == [1]
    assert live_study_of(tmp_path, 5).seconds_left == 0.0
