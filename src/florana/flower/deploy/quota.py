"""How often a site trains for its server within a day: a server that asks for more than its run needs is refused.

SITE/kept/trained.json    the times (seconds since 1970) of the trainings of the last 24 hours
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from florana.atomic_files import explained, replace_file
from florana.bounded import read_json
from florana.errors import FederationError, InputError
from florana.federation.local_engine import Fit, Memory
from florana.federation.messages import Brief, Reply

DAY = 86400.0
RUNS = 10
"""So many whole runs of its recipe a site trains in 24 hours, where it names no other number."""


@dataclass(frozen=True)
class Quota:
    """The limit of a site.

    Args:
        path: the file of times; made where it is not there.
        most: trainings within 24 hours.
        clock: seconds since 1970.
    """

    path: Path
    most: int
    clock: Callable[[], float] = time.time

    def take(self) -> None:
        """Note a training, before it begins.

        Raises:
            FederationError: there were as many as may be, or the disk refuses to note another.
            InputError: the file cannot be read.
        """
        now = self.clock()
        recent = [then for then in self._times() if then > now - DAY]
        if len(recent) >= self.most:
            raise FederationError(
                f"has trained {len(recent)} times within 24 hours, and its own limit is {self.most}",
                fix="the site raises it with 'florana join --trainings-a-day N'",
            )
        what = "the trainings of the day could not be counted, so nothing is trained"
        with explained(self.path.parent, what, "ask again"):
            replace_file(self.path, json.dumps([*recent, now]).encode())

    def _times(self) -> list[float]:
        if not self.path.exists():
            return []
        try:
            return [float(then) for then in read_json(self.path)]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.path} cannot be read", why=str(error), fix="remove it: the count of the day begins anew"
            ) from None


def limited(fit: Fit, quota: Quota) -> Fit:
    """The training of a site, held to its quota; later trips of a round train nothing, and are free."""

    def fitted(brief: Brief, memory: Memory) -> tuple[Reply, Memory]:
        if not brief.trip:
            quota.take()
        return fit(brief, memory)

    return fitted
