"""Who may speak now: the sites a server began with, less those that were taken off the roster since."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from florana.errors import InputError
from florana.flower.deploy.roster import Roster, read_roster

log = logging.getLogger("florana")


class LiveRoster(Mapping[bytes, str]):
    """Public key (PEM) -> client, looked up in the roster's file as it is now.

    A site that is revoked, or whose key is another one now, is none from its next request on. One that is added counts
    from the next start of the server. A roster that cannot be read, is not signed by the authority, or is older than
    the one seen before leaves everything as it was; one that is gone lets nobody in.

    Args:
        path: the roster's file.
        began: the roster as the server began.
    """

    def __init__(self, path: Path, began: Roster) -> None:
        self._path, self._approved, self._number = path, began.keys, began.number
        self._seen: tuple[int, int, int] | None = None
        self._standing: dict[bytes, str] = {key: client for client, key in began.keys.items()}

    def __getitem__(self, key: bytes) -> str:
        return self._now()[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> dict[bytes, str]:
        try:
            facts = self._path.stat()
            seen = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
        except OSError:
            seen = (0, 0, 0)
        if seen != self._seen:
            self._look()
            self._seen = seen
        return self._standing

    def _look(self) -> None:
        try:
            roster = read_roster(self._path)
        except InputError as error:
            log.warning("%s", error)
            return
        if roster.number < self._number and self._path.exists():
            log.warning("%s is an older roster than the one before it: it changes nothing", self._path)
            return
        standing = {key: client for client, key in self._approved.items() if roster.keys.get(client) == key}
        for client in sorted(set(self._standing.values()) - set(standing.values())):
            log.warning("%s was taken off the roster: it is no longer let in", client)
        self._standing, self._number = standing, max(roster.number, self._number)
