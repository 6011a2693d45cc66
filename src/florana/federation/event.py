"""What happens while a run goes on, for whoever shows it, logs it or tracks it."""

from __future__ import annotations

from dataclasses import dataclass

from florana.federation.round_record import RoundRecord


@dataclass(frozen=True)
class Event:
    """Something to show while a run goes on.

    Args:
        kind: joined, back, resumed, repaired, round, reply, refused, committed, ended, or told (of the end).
        round: counted from 1.
        client: whom it is about, where it is one client.
        detail: what happened, in words.
        record: the round's record, of a committed round.
    """

    kind: str
    round: int
    client: str = ""
    detail: str = ""
    record: RoundRecord | None = None
