"""The clients of a round of secure sums: who still takes part, who left and why, what each sent and was sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from florana.displayable import displayable
from florana.errors import BudgetSpent, FederationError
from florana.federation.collect import REASON
from florana.federation.event import Event
from florana.federation.messages import Engine, Failure, Step


@dataclass(eq=False)
class Table:
    """Who still takes part, and what it cost.

    Args:
        engine: reaches the clients.
        show: told of what happens.
        round_: the round's number.
        here: those who answered every step so far.
        refused: client -> why it does not count.
        spent: who of them has no privacy budget left.
        traffic: client -> {"up", "down"}, in bytes.
    """

    engine: Engine
    show: Callable[[Event], None]
    round_: int
    here: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    spent: set[str] = field(default_factory=set)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)

    def ask(self, what: str, steps: Mapping[str, Step]) -> dict[str, Step]:
        """The answers to a step; who gives none is here no more."""
        for client, step in steps.items():
            self._count(client, "down", step)
        answers = {}
        for client, answer in self.engine.exchange(steps):
            if isinstance(answer, Failure):
                self.lost(client, f"{what}: {answer.reason}")
                self.spent |= {client} if answer.spent else set()
            else:
                self._count(client, "up", answer)
                answers[client] = answer
        return {client: answers[client] for client in sorted(answers)}

    def lost(self, client: str, why: str) -> None:
        """A client that is here no more."""
        self.here = [name for name in self.here if name != client]
        self.refused[client] = displayable(why, REASON)
        self.show(Event("refused", self.round_, client, self.refused[client]))

    def _count(self, client: str, way: str, step: Step) -> None:
        self.traffic[client][way] += step.size

    def enough(self, what: str, asked: int, least: int) -> None:
        """Raise FederationError where fewer are here than a sum may have; BudgetSpent where budgets are why."""
        if len(self.here) < least:
            kind = BudgetSpent if self.spent else FederationError
            raise kind(
                f"round {self.round_}: {len(self.here)} of {asked} clients {what}, and {least} are the fewest of a sum",
                why=self.reasons(),
                fix=FIX,
            )

    def reasons(self) -> str:
        """Why clients are here no more."""
        return "; ".join(f"{client}: {why}" for client, why in sorted(self.refused.items())) or "no client answered"


FIX = "mend the clients named and run again with --resume: the rounds before this one are committed"
