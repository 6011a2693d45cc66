"""The audit log: every change is seen where it was made, a kill loses no line, and both ends tell the same story."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.errors import FederationError, InputError
from florana.flower.deploy.audit_chain import FIRST, digest_of, entry_of, line_of, verified
from florana.flower.deploy.audit_log import NAME, AuditLog, read_log
from tests.hostile import STRINGS, forbidden
from tests.program import florana, struck

TIME = "2026-01-01T00:00:00+00:00"


def log_in(folder: Path) -> AuditLog:
    return AuditLog(folder / NAME, lambda: TIME)


def filled(folder: Path, count: int = 6) -> bytes:
    for number in range(count):
        log_in(folder).add("asked", site=f"s{number}", round=number)
    return (folder / NAME).read_bytes()


def test_a_log_tells_what_was_added(tmp_path: Path) -> None:
    content = filled(tmp_path)
    entries, torn = verified(content)
    assert torn == b""
    assert [(e.number, e.time, e.event, e.facts["site"]) for e in entries] == [
        (n + 1, TIME, "asked", f"s{n}") for n in range(6)
    ]
    assert [e.facts["before"] for e in entries] == [FIRST, *(e.digest for e in entries[:-1])]
    assert entries[-1].digest == digest_of(content.splitlines()[-1])
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600


def edited(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at].replace(b"asked", b"ASKED"), *lines[at + 1 :]]


def rewritten(lines: list[bytes], at: int) -> list[bytes]:
    """A line that is whole in itself, in the place of the one that was there."""
    old = entry_of(lines[at])
    new = line_of(old.number, old.time, "other", {}, str(old.facts["before"]))
    return [*lines[:at], new, *lines[at + 1 :]]


def removed(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], *lines[at + 1 :]]


def doubled(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[: at + 1], *lines[at:]]


def moved(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]


def spaced(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at].replace(b'":', b'": '), *lines[at + 1 :]]


def junk(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], b"what is this", *lines[at:]]


@pytest.mark.parametrize("change", [edited, rewritten, removed, doubled, moved, spaced, junk])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_change_is_seen_where_it_was_made(change: Any, at: int, tmp_path: Path) -> None:
    lines = change(filled(tmp_path).splitlines(), at)
    with pytest.raises(InputError, match=r"does not hold from line (\d+) on") as caught:
        verified(b"".join(line + b"\n" for line in lines))
    line = int(str(caught.value).partition("from line ")[2].partition(" ")[0])
    assert at + 1 <= line <= at + 2


def test_lines_cut_off_at_the_end_are_seen_by_a_digest_kept_elsewhere(tmp_path: Path) -> None:
    whole = filled(tmp_path)
    head = verified(whole)[0][-1].digest
    shorter = b"\n".join(whole.splitlines()[:-1]) + b"\n"
    assert len(verified(shorter)[0]) == 5  # it holds by itself
    with pytest.raises(InputError, match="no line with the digest"):
        verified(shorter, head)
    log_in(tmp_path).add("asked")
    assert len(verified((tmp_path / NAME).read_bytes(), head)[0]) == 7  # an older head is in a longer log


@given(some.integers(1, 200))
def test_a_line_that_was_cut_off_is_closed_and_stays(cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = filled(folder, 3)
        cut = min(cut, len(whole.splitlines()[-1]))
        (folder / NAME).write_bytes(whole[:-cut])
        left = (folder / NAME).read_bytes().rpartition(b"\n")[2]
        log_in(folder).add("asked", site="next")
        content = (folder / NAME).read_bytes()
        entries, _ = verified(content)
        assert left in content
        events = ["asked"] * 4 if cut == 1 else ["asked", "asked", "closed", "asked"]  # of one only its end is missing
        assert [entry.event for entry in entries] == events


def adds(folder: Path, count: int) -> None:
    for number in range(count):
        log_in(folder).add("asked", round=number)


def test_a_kill_at_any_step_leaves_a_log_that_holds(tmp_path: Path) -> None:
    for step in range(1, 12):
        struck(adds, (tmp_path, 40), tmp_path, step)
        log_in(tmp_path).add("after", step=step)
        entries, torn = read_log(tmp_path)
        assert torn == b""
        assert entries[-1].facts["step"] == step


def test_a_line_longer_than_a_part_of_the_file_is_found_whole(tmp_path: Path) -> None:
    many = [f"site-{number:05d}" for number in range(20_000)]
    for number in range(3):
        log_in(tmp_path).add("committed", round=number, sites=many)
    assert [entry.number for entry in read_log(tmp_path)[0]] == [1, 2, 3]


def test_a_log_whose_end_was_changed_takes_no_more(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(filled(tmp_path) + b"{}\n")
    with pytest.raises(InputError, match="is not as it was written"):
        log_in(tmp_path).add("asked")


def test_a_disk_that_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FederationError, match="the audit log could not be written"):
        log_in(tmp_path).add("asked")


@pytest.mark.parametrize("text", STRINGS[:60])
def test_what_others_say_is_written_as_one_plain_line(text: str, tmp_path: Path) -> None:
    log_in(tmp_path).add("answered", reason=text)
    (entry,), _ = read_log(tmp_path)
    assert not forbidden(str(entry.facts["reason"]))
    assert (tmp_path / NAME).read_bytes().count(b"\n") == 1


def test_the_command_prints_the_log_and_ends_badly_where_it_does_not_hold(tmp_path: Path) -> None:
    content = filled(tmp_path)
    done = florana("flower", "audit", str(tmp_path))
    assert done.returncode == 0
    assert "6 entries" in done.stdout
    head = digest_of(content.splitlines()[-1])
    assert head in done.stdout
    assert json.loads(florana("flower", "audit", str(tmp_path), "--json", "--head", head).stdout)[5]["event"] == "asked"
    (tmp_path / NAME).write_bytes(content.replace(b"s3", b"s4"))
    done = florana("flower", "audit", str(tmp_path))
    assert done.returncode == 3
    assert "does not hold from line" in done.stderr
    assert florana("flower", "audit", str(tmp_path / "none")).returncode == 3
