"""The fixed terms of a run: who takes part, how often, and what counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from florana.dp.noise import Draws
from florana.federation.gate import MAX_CHANGE
from florana.federation.quantize import Format
from florana.federation.round_record import RoundRecord
from florana.federation.step_bounds import Reach
from florana.federation.weighting import Weighing
from florana.strategy.base import State

Scores = Mapping[str, float]
"""Metric name -> value."""


@dataclass(frozen=True)
class Sealing:
    """What a recipe says of secure sums.

    Args:
        bits: of each number.
        most: the most rows that one client counts for; 1 where all count alike.
        minimum: the fewest clients over which a sum is opened.
        run: the name of the run, of a server.
        losses: whether clients tell their training losses, in sums.
        clip: the most that a client's part has, where clients hide theirs by noise; None where they do not.
        spread: of that noise, see `hidden_part`.
    """

    bits: int
    most: int
    minimum: int
    run: str = "here"
    losses: bool = True
    clip: float | None = None
    spread: float = 0.0


@dataclass(frozen=True, eq=False)
class Noising:
    """How sums over clients get noise, so that no client's part in them can be told.

    Args:
        clip: C, the most that one client moves a sum.
        multiplier: sigma: each number of a sum gets noise of sigma C.
        begin: (round, the clients that are asked, what they are sent) -> the round's draws; it writes down what the
            round costs first, and raises BudgetSpent where that is more than is left.
        spent: the most that was spent on any client.
    """

    clip: float
    multiplier: float
    begin: Callable[[int, Sequence[str], bytes], Draws]
    spent: Callable[[], float]


@dataclass(frozen=True, eq=False)
class Federation:
    """The fixed facts of a run.

    Args:
        clients: all client names.
        rounds: how many rounds there are in all.
        per_round: how many clients take part in each round.
        seed: of sampling and of the clients' training.
        weighing: how much each update counts.
        evaluate: scores of a state's global model, or None where the server cannot measure.
        measured: whether a round is one that is measured.
        personal: whether a round is one in which clients measure their own models.
        minimum: the fewest usable updates.
        examples: client -> its training rows, where the server knows them.
        uplink: how clients write what they send, see `federation.quantize`.
        max_change: see `gate.oversized`.
        validate: as `evaluate`, on the rows to choose by; None where there are none.
        enough: whether the run ends with these records, before its last round.
        reach: training rows -> see `federation.step_bounds`; None where nobody knows.
        sealing: what the recipe says of secure sums; None where the server sees each update.
        noising: how sums get noise; None where they get none.
    """

    clients: Sequence[str]
    rounds: int
    per_round: int
    seed: int
    weighing: Weighing
    evaluate: Callable[[State], Scores] | None
    measured: Callable[[int], bool]
    personal: Callable[[int], bool]
    minimum: int = 1
    examples: Mapping[str, int] = field(default_factory=dict)
    uplink: Format = "float32"
    max_change: float = MAX_CHANGE
    validate: Callable[[State], Scores] | None = None
    enough: Callable[[Sequence[RoundRecord]], bool] = lambda records: False
    reach: Callable[[int], Reach | None] | None = None
    sealing: Sealing | None = None
    noising: Noising | None = None
