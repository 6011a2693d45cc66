"""The audit log of an operator or a site, on disk: a line is there, whole and flushed, before what it tells goes on.

    FED/audit.jsonl     approvals and revocations, each run, who came and left, what each site was asked and answered
    SITE/audit.jsonl    each run, what the server asked, what was sent back

No row, no tensor and no key is in it: of what was sent its size and sha256.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from florana.atomic_files import explained, sync_folder
from florana.bounded import read_bytes
from florana.errors import InputError
from florana.flower.deploy.audit_chain import CLOSED, FIRST, Entry, digest_of, entry_of, line_of, verified

if TYPE_CHECKING:  # it brings torch, and an operator's small commands need none
    from florana.federation.event import Event

NAME = "audit.jsonl"
TAIL_BYTES = 2**16
"""Of the end of a log, in which its last whole line is looked for first; then in twice as many, and so on."""
MOST_BYTES = 2**30

SHOWN = {"joined", "back", "refused", "committed", "told", "resumed", "repaired", "ended"}
"""Kinds of a run's events that go into the log as they are."""


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class AuditLog:
    """A log that lines are added to.

    Args:
        path: the file; made where it is not there, for this account alone.
        clock: the time, as it is written.
    """

    path: Path
    clock: Callable[[], str] = now

    def add(self, event: str, **facts: Any) -> None:
        """Add a line, after closing one that a kill cut off.

        Args:
            event: what happened.
            facts: about it: texts, numbers, lists of texts.

        Raises:
            FederationError: the disk refuses.
            InputError: the file is no log, or its last line was changed.
        """
        what = "the audit log could not be written, so nothing goes on"
        with explained(self.path.parent, what, "start it again"), self._alone():
            number, before, torn = _end(self.path)
            ended, lines = (b"\n" if torn else b""), []
            if torn and (whole := _follows(torn, before)) is not None:  # nothing but its end is missing
                number, before = whole.number, whole.digest
            elif torn:
                lines.append(line_of(number + 1, self.clock(), CLOSED, {"torn": digest_of(torn)}, before))
                number, before = number + 1, digest_of(lines[0])
            lines.append(line_of(number + 1, self.clock(), event, facts, before))
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as stream:
                stream.write(ended + b"".join(line + b"\n" for line in lines))
                stream.flush()
                os.fsync(stream.fileno())
            if number == 0:
                sync_folder(self.path.parent)

    def shown(self, show: Callable[[Event], None]) -> Callable[[Event], None]:
        """`show`, with a line for each event that says who came, left, was refused or counted."""

        def noted(event: Event) -> None:
            if event.kind in SHOWN:
                facts: dict[str, Any] = {"site": event.client, "detail": event.detail, "round": event.round}
                if event.record is not None:
                    facts |= {"sites": list(event.record.clients), "weights": dict(event.record.weights)}
                self.add(event.kind, **{name: fact for name, fact in facts.items() if fact})
            show(event)

        return noted

    def _alone(self) -> filelock.BaseFileLock:
        """Two programs may add at a time: a server, and `florana flower revoke`."""
        return filelock.FileLock(self.path.with_suffix(".lock"), mode=0o600, timeout=60)


def read_log(place: Path, head: str | None = None) -> tuple[list[Entry], bytes]:
    """The entries of a log, checked as `audit_chain.verified` does.

    Args:
        place: the file, or the folder of an operator or a site.
        head: a digest that must be in it.

    Raises:
        InputError: there is none, or it does not hold.
    """
    path = place / NAME if place.is_dir() else place
    try:
        return verified(read_bytes(path, MOST_BYTES), head)
    except FileNotFoundError:
        raise InputError(f"there is no audit log {path}", fix="give the folder of an operator or a site") from None
    except (OSError, ValueError) as error:
        raise InputError(f"the audit log {path} cannot be read", why=str(error)) from None


def _follows(line: bytes, before: str) -> Entry | None:
    """The entry in a line, if it is one that follows the line with that digest."""
    try:
        entry = entry_of(line)
    except ValueError:
        return None
    return entry if entry.facts["before"] == before else None


def _end(path: Path) -> tuple[int, str, bytes]:
    """(the number of the last whole line, its digest, what stands after it); of a new file (0, zeros, nothing)."""
    line, torn = _tail(path)
    if line is None:
        return 0, FIRST, torn
    try:
        last = entry_of(line)
    except ValueError as error:
        raise InputError(
            f"the last line of the audit log {path} is not as it was written",
            why=str(error),
            fix="keep the file as evidence, under another name; a new log begins with the next start",
        ) from None
    return last.number, last.digest, torn


def _tail(path: Path) -> tuple[bytes | None, bytes]:
    """The last whole line, None where there is none, and what stands after it."""
    try:
        with path.open("rb") as stream:
            size, taken = os.fstat(stream.fileno()).st_size, TAIL_BYTES
            while True:
                stream.seek(max(0, size - taken))
                *lines, torn = stream.read(taken).split(b"\n")
                if taken >= size or len(lines) > 1:  # the first line of a part may be half a line
                    return (lines[-1] if lines else None), torn
                taken *= 2
    except FileNotFoundError:
        return None, b""
