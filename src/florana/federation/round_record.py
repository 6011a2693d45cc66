"""One committed round as the journal keeps it: plain numbers and names, one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round.

    Args:
        round: counted from 1.
        strategy: the strategy's name.
        clients: whose updates were aggregated, sorted.
        refused: client -> reason.
        examples: client -> training examples.
        weights: client -> share in the aggregation, summing to 1.
        train_loss: mean of the clients' losses, with those weights; None when none was reported.
        eval: {"global": {...}, "personal": {...}, "clients_on_common": {...}, "gap": {...}}; empty when not measured.
        bytes_up: what all clients of the round sent, in bytes.
        bytes_down: what was sent to all clients of the round, in bytes.
        server_seconds: the time of the strategy's step alone, in seconds.
        client_seconds: the time of the clients' training, summed, in seconds.
        error: {"overall", "optimum", "per_module": {name: {"error", "optimum"}}}; with a quantized uplink also
            "uplink": the mean of the clients' `federation.error_feedback.uplink_error`, with those weights.
        notes: what the strategy says of its step.
        traffic: client -> {"up", "down"}, its part of the bytes.
    """

    round: int
    strategy: str
    clients: Sequence[str]
    refused: Mapping[str, str]
    examples: Mapping[str, int]
    weights: Mapping[str, float]
    train_loss: float | None
    eval: Mapping[str, Mapping[str, float]]
    bytes_up: int
    bytes_down: int
    server_seconds: float
    client_seconds: float
    error: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)
    traffic: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON's own types, in the order of the fields."""
        return asdict(self)


def slim(record: RoundRecord) -> RoundRecord:
    """The record without what grows with modules and clients: what a long run may hold of all its rounds."""
    return replace(record, refused={}, weights={}, examples={}, clients=(), error={}, notes={}, traffic={})


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "round": int,
    "strategy": str,
    "clients": list,
    "train_loss": (int, float, type(None)),
    "bytes_up": int,
    "bytes_down": int,
    "server_seconds": (int, float),
    "client_seconds": (int, float),
}
"""What JSON makes of each field; of the others a table."""


def record_from_json(data: Mapping[str, Any]) -> RoundRecord:
    """The inverse of `RoundRecord.to_json`; raises TypeError for a missing or foreign field, or one of another kind."""
    record = RoundRecord(**data)
    for name, value in vars(record).items():
        if not isinstance(value, _KINDS.get(name, dict)):
            raise TypeError(f"'{name}' is {value!r}"[:200])
    for inner in (*record.eval.values(), *record.traffic.values()):
        if not isinstance(inner, dict):
            raise TypeError("'eval' or 'traffic' holds something else than tables")
    if "overall" not in record.error:
        raise TypeError("'error' has no 'overall'")
    return record
