"""The end of a federation: every site that is connected is told, and gets the adapter that came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import MessageType

from florana.displayable import displayable
from florana.federation.event import Event
from florana.federation.messages import Failure, pack
from florana.flower.app.flower_engine import Nodes, Seat, exchange
from florana.flower.app.frames import Frame
from florana.lora.factors import Adapter

ENDED = "ended"
"""The kind of the last request of a run, and of the answer of a site that takes it."""

PATIENCE = 60.0
"""Seconds that a site has to take the adapter and write it down."""


def ended_frame(run: str, rounds: int, adapter: Adapter | None) -> Frame:
    """What a site is told at the end.

    Args:
        run: the name of the run, by which the site keeps what stays with it.
        rounds: how many rounds were committed.
        adapter: what the run's adapter folder holds; None where the server has no model of its own.
    """
    if adapter is None:
        return Frame(ENDED, {"run": run, "rounds": rounds})
    return Frame(ENDED, {"run": run, "rounds": rounds, "scalings": adapter.scalings}, pack(adapter))


def farewell(
    grid: Nodes, seats: Mapping[str, Seat], frame: Frame, deadline: float, show: Callable[[Event], None]
) -> None:
    """Tell every site; what one of them says to it is shown and changes nothing: the run is done.

    Args:
        grid: the connection to the nodes.
        seats: client -> its seat, of those that are connected.
        frame: of `ended_frame`.
        deadline: of a round, in seconds; a site has `PATIENCE` at most.
        show: told of each site.
    """
    rounds = int(frame.fields["rounds"])
    asked = {client: (seat.node, frame) for client, seat in seats.items()}
    for client, answer in exchange(grid, asked, min(deadline, PATIENCE), MessageType.QUERY):
        if isinstance(answer, Frame) and answer.kind == ENDED:
            detail = "has the adapter" if frame.payload else "knows that the run has ended"
        else:
            why = answer.reason if isinstance(answer, Failure) else str(answer.fields.get("reason", answer.kind))
            detail = f"did not take the adapter: {displayable(why, 300)}"
        show(Event("told", rounds, client, detail))
