"""Clients whose updates are differentially private in their rows: `fit` as `TrainingClients` has it, with a ledger.

brief -> is there budget? -> DP-SGD -> charged, on the disk -> reply without any figure of the rows
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from florana.dp.accounting import Budget, Mechanism, epsilon_of
from florana.dp.ledger import Charge, Ledger, spent
from florana.errors import BudgetSpent, FloranaError
from florana.federation.messages import Brief, Reply
from florana.lora.factors import Adapter
from florana.train.client import TrainingClients
from florana.train.cohort import adapter_of
from florana.train.private_steps import Noise, train_privately

EPSILON = "epsilon"
"""The figure that goes along: what was spent on a client's rows, this update included."""

HIDDEN = ("train_loss",)
"""Figures of rows, which have no noise in them."""


Watched = Callable[[Brief, Adapter, Mapping[str, Tensor]], None]
"""Told of an update: the request, what was received, what was trained."""


def unwatched(brief: Brief, received: Adapter, trained: Mapping[str, Tensor]) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Release:
    """What one training is called, and where its draws come from.

    Args:
        name: one that no other training has; the same for one that is the same to the bit.
        key: 32 bytes.
    """

    name: str
    key: bytes


@dataclass(frozen=True, eq=False)
class PrivateClients:
    """All clients here, each with a budget of its own.

    Args:
        clients: what they are without privacy.
        clip: C.
        budget: what may be spent on each client's rows, in all.
        round: client -> what one round of it releases.
        ledger: where charges are written, before anything leaves.
        released: what a training that is asked for is called.
        watched: told of each update before it leaves.
    """

    clients: TrainingClients
    clip: float
    budget: Budget
    round: Mapping[str, Mechanism]
    ledger: Ledger
    released: Callable[[Brief], Release]
    watched: Watched = unwatched

    def fit(self, brief: Brief, memory: Mapping[str, Tensor]) -> tuple[Reply, Mapping[str, Tensor]]:
        """One round of one client: the reply, and what it keeps.

        Raises:
            BudgetSpent: the round would cost more than is left; nothing was trained.
            FloranaError: it cannot train, or the ledger cannot be read or written; nothing leaves.
        """
        if brief.trip:  # of an update that was paid for
            return self.clients.fit(brief, memory)
        started, once, release = time.perf_counter(), self.round[brief.client], self.released(brief)
        self._require(brief.client, release.name, once)
        received = self.clients.received(brief, memory)
        self.clients.bench.load(*received, brief.trains, brief.blocks)
        try:
            trained = train_privately(
                self.clients.bench,
                received[0],
                self.clients.data[brief.client].bins,
                self.clients.train,
                brief.trains,
                Noise(self.clip, once.noise_multiplier, release.key),
                blocks=brief.blocks,
                pruning=brief.pruning,
                stepped=lambda: self.clients.step(brief.client),
                place=(brief.round, self.clients.rounds),
            )
        except FloranaError:
            self._charge(brief, release.name, once)  # that it failed is told, and depends on the rows
            raise
        self._charge(brief, release.name, once)
        seconds = time.perf_counter() - started
        self.watched(brief, received[0], trained)
        own = adapter_of(trained, received[0])
        reply, kept = self.clients.answer(replace(brief, evaluate=False), memory, received, own, 0.0, seconds)
        if brief.sealed:
            return reply, kept
        told = {name: value for name, value in reply.metrics.items() if name not in HIDDEN}
        return replace(reply, metrics={**told, EPSILON: self.spent(brief.client)}), kept

    def spent(self, client: str) -> float:
        """Epsilon of all that was released of a client's rows."""
        return spent(self.ledger.charges(client), self.budget)

    def _require(self, client: str, release: str, once: Mechanism) -> None:
        before = [charge for charge in self.ledger.charges(client) if charge.release != release]
        after = epsilon_of([*(charge.mechanism for charge in before), once], self.budget.delta, self.budget.accountant)
        if after > self.budget.epsilon:
            raise BudgetSpent(
                f"the privacy budget of '{client}' is spent: {spent(before, self.budget):.4g} of epsilon = "
                f"{self.budget.epsilon:g} after {len(before)} rounds, and another would make it {after:.4g}"
            )

    def _charge(self, brief: Brief, release: str, once: Mechanism) -> None:
        charge = Charge(brief.client, brief.round, release, once.rate, once.noise_multiplier, once.steps)
        self.ledger.add(charge)
