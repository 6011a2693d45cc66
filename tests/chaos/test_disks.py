"""A disk that is full, or turns read-only, at each write: real ones, small, at the server and at a site."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

import florana.flower.deploy.join as joining
from florana.errors import FederationError
from florana.federation.messages import Brief, pack
from florana.flower.app.codec import brief_frame
from florana.flower.app.frames import Frame
from florana.flower.app.site_card import digest
from florana.flower.deploy.audit_log import read_log
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.invitation import Invitation
from florana.flower.deploy.keys import Certificates, make_site
from florana.flower.deploy.roster import approve, read_roster
from florana.flower.deploy.serve import check_certificates
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.setup import execute
from tests.chaos.counts import Tally, often
from tests.chaos.counts import digest as adapter_of
from tests.flower_sites import grid_of, led, roster_of, sites
from tests.program import florana

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="a small file system needs root"),
]
PAGE = 4096
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """A file system of its own, in memory, that is spoilt just before a chosen file on it is opened for writing."""

    def __init__(self, place: Path) -> None:
        self.place, self._filler, self._closed = place, place / "filler", False
        self.opened, self._at, self._how = 0, 0, "full"

    def spoilt_at(self, at: int, how: str) -> None:
        """Be full, or read-only, from the opening of that number on, counted from now."""
        self.opened, self._at, self._how = 0, at, how

    def opening(self, path: str) -> None:
        """Told of each file that is opened for writing, before it is."""
        if not path.startswith(str(self.place)) or path == str(self._filler):
            return
        self.opened += 1
        if self.opened == self._at:
            if self._how == "full":
                self.fill()
            else:
                self._close()

    def fill(self) -> None:
        """By somebody else's file."""
        with self._filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(PAGE))

    def _close(self) -> None:
        """Nothing can be opened for writing any more: not by a remount, which a file that is open forbids."""
        for options in (["--bind", str(self.place)], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, str(self.place)], check=True)
        self._closed = True

    def mend(self) -> None:
        if self._closed:
            subprocess.run(["umount", "--lazy", str(self.place)], check=True)
        self._closed, self._at = False, 0
        self._filler.unlink(missing_ok=True)


WATCHED: list[Disk] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's own hook: it hears of each opening before it is done, and can never be taken off again."""
    if event == "open" and WATCHED and isinstance(arguments[0], str) and arguments[2] & WRITES:
        WATCHED[0].opening(arguments[0])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    if not WATCHED:
        sys.addaudithook(watch)
    WATCHED[:] = [Disk(place)]
    try:
        yield WATCHED[0]
    finally:
        WATCHED[0].mend()
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def recipe_of(table: dict[str, Any]) -> Recipe:
    return check({**table, "federation": {"rounds": 3, "min_clients": 3}}, "t")


def spoilings(count: int, opened: int) -> list[tuple[int, str]]:
    """So many of the writes, the first and the last among them, each with what befalls the disk."""
    return [(1 + (opened - 1) * n // (count - 1), ("full", "read-only")[n % 2]) for n in range(count)]


def refusal(do: Callable[[], object]) -> FederationError | None:
    """What it was refused with; None where it went through."""
    try:
        do()
    except FederationError as error:
        return error
    return None


@often(3, 30)
def test_at_the_server_the_rounds_before_stand(
    count: int, disk: Disk, table: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    """The run ends with what to do; mended and resumed it ends in the bytes of a run that was left alone."""
    recipe = recipe_of(table)
    members, place = sites(recipe, tmp_path / "kept"), disk.place / "run"
    roster, refused = roster_of(list(members), tmp_path), 0
    disk.spoilt_at(0, "full")
    led(recipe, grid_of(members), roster, place)
    whole, opened = adapter_of(place), disk.opened
    for number, (at, how) in enumerate(spoilings(count, opened)):
        shutil.rmtree(place)
        own = {name: replace(site, folder=tmp_path / str(number)) for name, site in members.items()}
        disk.spoilt_at(at, how)
        said = refusal(lambda own=own: led(recipe, grid_of(own), roster, place))
        disk.mend()
        if said is not None:
            refused += 1
            assert ("read-only" if how == "read-only" else "free some disk space") in str(said.fix), (at, how)
            records = place / "rounds.jsonl"
            before = records.read_bytes() if records.exists() else b""
            led(recipe, grid_of(own), roster, place, resume=True)
            assert records.read_bytes().startswith(before)
        assert adapter_of(place) == whole, (at, how)
    assert refused >= count * 2 // 3
    words = f"the rounds before stand, the same bytes; {count - refused} more were in time"
    tally("a full or read-only disk at the server, a real one, at each write", refused, words)


@often(3, 30)
def test_at_a_site_nothing_is_answered_that_is_not_written_down(
    count: int, disk: Disk, table: dict[str, Any], tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with what to do, or says to the server that it could not; started again it answers as it would have."""
    recipe = recipe_of(table)
    site = sites(recipe, tmp_path / "made")["client-0"]
    card = site.card.model_copy(update={"holds": site.card.holds.model_copy(update={"per_label": None})})
    brief = Brief(1, "client-0", 1, pack(site.start), False, ["A", "B"], ["A"], site.start.scalings)
    sent = [brief_frame(replace(brief, round=round_), "run", "word", digest(card)) for round_ in (1, 2, 3)]
    there = Invitation(tmp_path, "127.0.0.1", 1, tmp_path / "ca.crt", tmp_path / "recipe.toml")
    setup, place = joining.prepare_site(recipe, "client-0", None), disk.place / "site"
    monkeypatch.setattr(joining, "prepare_site", lambda *given: setup)
    made = list[Frame]()

    def line(invitation: Invitation, key: Path, asked: Callable[[Frame], Frame], *rest: Any) -> None:
        made.clear()
        for frame in sent:
            made.append(asked(frame))

    monkeypatch.setattr(joining, "attend", line)

    def joined() -> None:
        joining.join(recipe, there, place, None, done=threading.Event())

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        make_site(place, "client-0")

    begin()
    disk.spoilt_at(0, "full")
    joined()
    whole, opened, ended, failed = list(made), disk.opened, 0, 0
    assert [frame.kind for frame in whole] == ["reply"] * 3
    for at, how in spoilings(count, opened):
        begin()
        disk.spoilt_at(at, how)
        made.clear()
        said = refusal(joined)
        disk.mend()
        for frame, right in zip(made, whole, strict=False):
            assert frame.kind == "failure" or frame.payload == right.payload, (at, how)
        ended += said is not None
        failed += any(frame.kind == "failure" for frame in made)
        if said is not None:
            words = "mount it for writing" if how == "read-only" else "free some disk space"
            assert words in str(said.fix), (at, how, said)
            assert "--resume" not in str(said.fix), (at, how, said)
        joined()
        assert [frame.payload for frame in made] == [frame.payload for frame in whole], (at, how)
        read_log(place)
    assert ended + failed >= count * 2 // 3
    words = f"{ended} ended with advice, {failed} told the server why; started again, the same bytes"
    tally("a full or read-only disk at a site, a real one, at each write", count, words)


def test_no_verb_takes_a_full_disk_for_a_bug(disk: Disk, table: dict[str, Any], tmp_path: Path) -> None:
    recipe, rows = tmp_path / "recipe.toml", tmp_path / "rows.csv"
    recipe.write_text(tomli_w.dumps({**table, "study": {"seeds": 1, "methods": ["fedit"], "controls": []}}))
    rows.write_text("text,label\n" + "a good film,1\na dull plot,0\n" * 20)
    execute(recipe_of(table), tmp_path / "whole")
    adapter = str(tmp_path / "whole" / "adapter")
    files = make_server(tmp_path / "fed", ["127.0.0.1"])
    approve(files, make_site(tmp_path / "site", "client-0")[1])
    invited = ("flower", "invite", str(recipe), "--fed", str(files.folder), "--no-base")
    shutil.copytree(files.folder, disk.place / "fed")
    disk.fill()
    for name, arguments in {
        "keys": ("flower", "keys", "a"),
        "server": ("flower", "keys", "localhost", "--server"),
        "invitation": invited,
        "first.toml": ("init", str(rows)),
        "run": ("run", str(recipe)),
        "study": ("compare", str(recipe)),
        "merged": ("merge", adapter, adapter),
        "report.html": ("report", str(tmp_path / "whole")),
    }.items():
        done = florana(*arguments, "--out", str(disk.place / name), cwd=tmp_path)
        assert done.returncode in (2, 4), (name, done.stdout, done.stderr)
        assert "No space left" in done.stderr, (name, done.stderr)
    make_site(tmp_path / "b", "b")
    public = str(tmp_path / "b" / "b.pub")
    there = str(disk.place / "fed")
    for arguments in (
        ("approve", there, public),
        ("renew", there),
        ("revoke", there, "client-0"),
        ("export", str(disk.place / "app"), "--recipe", str(recipe)),
    ):
        done = florana("flower", *arguments, cwd=tmp_path)
        assert done.returncode == 4, (arguments, done.stderr)
        assert "No space left" in done.stderr, (arguments, done.stderr)
    disk.mend()
    check_certificates(Certificates(disk.place / "fed"))  # nothing of it is half new
    assert list(read_roster(Certificates(disk.place / "fed").roster).keys) == ["client-0"]
