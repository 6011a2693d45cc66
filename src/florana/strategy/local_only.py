"""local-only: every client trains its own adapter, nothing is sent: the control that shows what a federation brings."""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.validate import average_extra
from florana.lora.factors import Adapter, Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, sending, start, work

NOTHING = facts.Count("0", lambda size: 0)
FACTS = facts.Facts(
    does="nothing",
    trains="A, B",
    up=NOTHING,
    down=NOTHING,
    exact="no global product",
    absent="nothing",
    client_state="A_u and B_u; lost, they begin anew",
    mixed_ranks="refused: the control has one rank",
    secure_aggregation="yes: nothing is sent",
    noise="none",
    robust="no: its server sums nothing up",
    one_model=False,
)
WORK = work(trains=["A", "B"], up=[], down=[])


def build() -> Strategy:
    """The control; it has no options. Heads should be personal (`model.head`), or they are averaged all the same."""
    return Strategy("local-only", "a control", FACTS, start, sending(WORK), _step)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, Adapter(state.adapter.modules, average_extra(parts))))
