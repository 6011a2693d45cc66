"""What was spent, on the disk before anything of it leaves.

    one line of JSON a release: client, round, release, rate, noise_multiplier, steps

A release is named. One that is written twice under its name is one: the same bytes made again. Lines are only added,
each flushed to the disk; a kill between the line and the release so counts too much, never too little.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from florana.atomic_files import explained, sync_folder, without_torn_line
from florana.bounded import json_of
from florana.dp.accounting import Budget, Mechanism, epsilon_of
from florana.errors import FederationError, InputError


@dataclass(frozen=True)
class Charge:
    """One line.

    Args:
        client: whose rows.
        round: of its run.
        release: a name that no other release has.
        rate: see `Mechanism`.
        noise_multiplier: see `Mechanism`.
        steps: see `Mechanism`.
    """

    client: str
    round: int
    release: str
    rate: float
    noise_multiplier: float
    steps: int

    @property
    def mechanism(self) -> Mechanism:
        """What was released."""
        return Mechanism(self.rate, self.noise_multiplier, self.steps)


@dataclass(frozen=True)
class Ledger:
    """A file of charges.

    Args:
        path: the file; `begin` makes it.
    """

    path: Path

    def begin(self) -> None:
        """Make the file where there is none, and take off a line that a kill left half written: nothing left for it."""
        with explained(self.path.parent, "what is spent could not be written down, so nothing is trained"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            without_torn_line(self.path)
            sync_folder(self.path.parent)

    def add(self, charge: Charge) -> None:
        """Write a charge and flush it to the disk; one that is there stays one.

        Raises:
            FederationError: the disk refused, or refused a part of an earlier line; a new start (`begin`) mends that.
            InputError: the file is gone, or is no ledger.
        """
        if any(known.release == charge.release for known in self.charges(charge.client)):
            return
        if not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size:  # workers share it: none mends it
            raise FederationError(
                f"{self.path} ends in half a line, so nothing leaves", fix="free the disk, start again"
            )
        with explained(self.path.parent, "what is spent could not be written down, so nothing leaves"):
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            with os.fdopen(handle, "ab") as stream:  # a buffer writes all or raises; a bare write may write a part
                stream.write(json.dumps(asdict(charge)).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())

    def charges(self, client: str | None = None) -> list[Charge]:
        """What was spent on that client's rows; None: on everybody's.

        Raises:
            InputError: the file is gone, or is no ledger.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
            rows = [Charge(**json_of(line)) for line in lines]
            for row in rows:
                if not (0 < row.rate <= 1 and row.noise_multiplier > 0 and row.steps >= 0):
                    raise ValueError(f"a charge of {row}")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.path}: what was spent of the privacy budget cannot be read",
                why=f"{type(error).__name__}: {error}",
                fix="restore the file from a copy: without it nobody knows what is left",
            ) from None
        return list({row.release: row for row in rows if client in (None, row.client)}.values())


def spent(charges: Sequence[Charge], budget: Budget) -> float:
    """Epsilon of the charges of one client, at the budget's delta."""
    return epsilon_of([charge.mechanism for charge in charges], budget.delta, budget.accountant)
