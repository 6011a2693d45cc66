"""A log in which nothing can be changed unseen: each line holds the digest of the line before it.

    line_i = JSON {before: sha256(line_{i-1}), event, n: i, time, ...facts}, keys sorted, no spaces; before_1 = 00...0

An edited, removed, added or moved line breaks the chain where it stands. Lines cut off at the end leave a shorter chain
that holds: that is seen only by who keeps the last digest elsewhere (`florana flower audit` prints it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from florana.bounded import json_of
from florana.displayable import displayable
from florana.errors import InputError

FIRST = "0" * 64
"""What the first line has for the digest of a line before it."""

CLOSED = "closed"
"""The event after a line that a kill or a full disk cut off; it holds the digest of what is left of it."""

LONGEST = 500
"""Characters of a fact."""


@dataclass(frozen=True)
class Entry:
    """A line of a log.

    Args:
        number: counted from 1.
        time: UTC, as ISO 8601 has it.
        event: what happened.
        facts: about it, by name.
        digest: sha256 of the line.
    """

    number: int
    time: str
    event: str
    facts: Mapping[str, Any]
    digest: str


def digest_of(line: bytes) -> str:
    """sha256 of a line without its end, in hexadecimal."""
    return hashlib.sha256(line).hexdigest()


def line_of(number: int, time: str, event: str, facts: Mapping[str, Any], before: str) -> bytes:
    """A line, without its end.

    Args:
        number: counted from 1.
        time: UTC, as ISO 8601 has it.
        event: what happened.
        facts: names and numbers; texts are made displayable.
        before: the digest of the line before it.

    Examples:
        >>> entry_of(line_of(1, "2026-01-01T00:00:00+00:00", "asked", {"round": 1}, FIRST)).facts["round"]
        1
    """
    plain = {name: displayable(fact, LONGEST) if isinstance(fact, str) else fact for name, fact in facts.items()}
    return _canonical({**plain, "before": before, "event": event, "n": number, "time": time})


def entry_of(line: bytes) -> Entry:
    """The entry in a line. Raises ValueError where it is not what `line_of` writes."""
    table = json_of(line)
    if not isinstance(table, dict) or _canonical(table) != line:
        raise ValueError("it is not as florana writes it")
    number, time, event = table.pop("n", None), table.pop("time", None), table.pop("event", None)
    if not (isinstance(number, int) and isinstance(time, str) and isinstance(event, str) and "before" in table):
        raise ValueError("it lacks its number, time, event or the digest before it")
    return Entry(number, time, event, table, digest_of(line))


def verified(content: bytes, head: str | None = None) -> tuple[list[Entry], bytes]:
    """Every entry of a log, each checked against the one before it.

    Args:
        content: the file's bytes.
        head: the digest of a line that must be in it, as it was noted elsewhere; None asks for none.

    Returns:
        The entries, and the bytes of a last line that was cut off, mostly empty.

    Raises:
        InputError: the first line that does not hold, by its number; or no line has the digest `head`.
    """
    *lines, torn = content.split(b"\n")
    entries: list[Entry] = []
    left: bytes | None = None
    for place, line in enumerate(lines, start=1):
        try:
            entry = entry_of(line)
        except ValueError as error:
            if left is None and place < len(lines):  # it may be what a kill left, if the next line says so
                left = line
                continue
            raise _broken(place if left is None else place - 1, str(error)) from None
        last = entries[-1].digest if entries else FIRST
        if entry.facts["before"] != last:
            raise _broken(place, "the digest in it is not that of the line before it")
        if entry.number != len(entries) + 1:
            raise _broken(place, f"its number is {entry.number}, where {len(entries) + 1} comes next")
        if (left is None) != (entry.event != CLOSED):
            raise _broken(place, "a line that was cut off and the entry that closes it do not stand together")
        if left is not None and entry.facts.get("torn") != digest_of(left):
            raise _broken(place - 1, "it is not what was left when the log was closed")
        left = None
        entries.append(entry)
    if left is not None:
        raise _broken(len(lines), "it cannot be read, and no entry closes it")
    if head is not None and head not in {entry.digest for entry in entries}:
        raise InputError(
            "the log holds, but it has no line with the digest that was given",
            why="lines were cut off at its end, or it is another log",
            fix="compare it with a copy",
        )
    return entries, torn


def _canonical(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _broken(line: int, why: str) -> InputError:
    fix = "compare it with a copy: somebody or something changed it"
    return InputError(f"the log does not hold from line {line} on", why=why, fix=fix)
