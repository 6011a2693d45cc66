"""A site takes part in one run: what another asks of it meanwhile is refused, and stands in its audit log."""

from __future__ import annotations

from collections.abc import Callable

from florana.flower.app.codec import failure_frame
from florana.flower.app.farewell import ENDED
from florana.flower.app.frames import Frame

Answer = Callable[[Frame], Frame]
"""A site's answer to a request of its server."""

WORK = frozenset({"train", "sealed"})
"""Kinds of requests that take something of the site's rows."""


def one_run(answer: Answer, refused: Callable[[str], None]) -> Answer:
    """The same answers, of one run: that of the first work that was done. A resumed run has the name it had.

    Args:
        answer: a site's. A failure, or word that the site has changed, binds it to no run; registration is free, since
            it tells what the site is and takes nothing.
        refused: told why another run's work, or its last word, is refused.
    """
    taken: list[str] = []

    def held(frame: Frame) -> Frame:
        asks = str(frame.fields.get("run", ""))
        if taken and asks != taken[0] and frame.kind in WORK | {ENDED}:
            reason = (
                f"takes part in the run {taken[0][:8]}, and was asked by the run {asks[:8]}; it takes another one when "
                "it is started again, or any with 'florana join --stay'"
            )
            refused(reason)
            return failure_frame(reason)
        made = answer(frame)
        if not taken and frame.kind in WORK and made.kind not in ("failure", "changed"):
            taken.append(asks)
        return made

    return held
