"""`[engine] cohort`: the clients of a round in groups that train in one pass; what the local engine calls.

asked -> groups of alike clients -> chunks of `size` -> train_together -> each client's reply, as it gives it alone
"""

from __future__ import annotations

import functools
import time
from collections.abc import Generator, Hashable, Iterator, Sequence

import torch

from florana.displayable import log
from florana.errors import FloranaError
from florana.federation.local_engine import Asked, Outcome, one_after_the_other
from florana.federation.trip_memory import own
from florana.train.client import TrainingClients, require_rows, steps_per_round
from florana.train.cohort import Member, adapter_of, train_together
from florana.train.cohort_probe import require_together
from florana.train.optimizer import is_constant

AUTO = 16
"""Clients at once on a device of its own, where the recipe says "auto"."""
SHORT = ("out of memory", "can't allocate memory", "not enough memory")


class Cohorts:
    """All clients of a round, several in each pass; their outcomes in the order in which they are asked.

    Args:
        clients: what trains one alone, and answers for it.
        size: how many at once, at most; halved for good when memory runs short.
    """

    def __init__(self, clients: TrainingClients, size: int) -> None:
        self._clients, self.size = clients, size

    def __call__(self, asked: Sequence[Asked]) -> Generator[Outcome, None, None]:
        """Each client's outcome."""
        if asked and asked[0][0].trip:  # of what was trained before
            yield from one_after_the_other(self._clients.fit, asked)
            return
        found: dict[int, Outcome] = {}
        rest = iter(_grouped(self._clients, asked))
        group: list[int] = []
        for number in range(len(asked)):
            while number not in found:
                group = group or next(rest)
                found |= self._trained(group[: self.size], asked)
                group = [waiting for waiting in group if waiting not in found]
            yield found.pop(number)

    def _trained(self, numbers: Sequence[int], asked: Sequence[Asked]) -> dict[int, Outcome]:
        """The outcomes of some of the clients: of none where there was too little memory for so many."""
        try:
            return dict(zip(numbers, self._fit([asked[number] for number in numbers]), strict=True))
        except Exception as error:
            if not _short(error):
                return dict.fromkeys(numbers, error)
            if len(numbers) == 1:
                return {
                    numbers[0]: FloranaError("there is too little memory to train it", fix="lower train.batch_size")
                }
        self.size = len(numbers) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("memory is short for %d clients at once: %d from here on", len(numbers), self.size)
        return {}

    def _fit(self, asked: Sequence[Asked]) -> list[Outcome]:
        """The outcomes of clients that go through the model together."""
        started, clients = time.perf_counter(), self._clients
        first = asked[0][0]
        for brief, _ in asked:
            require_rows(clients.data[brief.client].bins)
        received = [clients.received(brief, memory) for brief, memory in asked]
        members = [
            Member(
                adapter,
                clients.data[brief.client].bins,
                brief.seed,
                brief.blocks,
                brief.pruning,
                functools.partial(clients.step, brief.client),
            )
            for (brief, _), (adapter, _) in zip(asked, received, strict=True)
        ]
        clients.bench.load(*received[0], first.trains, first.blocks)
        place = (first.round, clients.rounds)
        trained = train_together(clients.bench, members, clients.train, first.trains, place)
        seconds = (time.perf_counter() - started) / len(asked)
        outcomes: list[Outcome] = []
        for (brief, memory), given, result in zip(asked, received, trained, strict=True):
            if isinstance(result, FloranaError):
                outcomes.append(result)
                continue
            tensors, loss = result
            adapter = adapter_of(tensors, given[0])
            outcomes.append(clients.answer(brief, memory, given, adapter, loss, seconds))
        return outcomes


def in_cohorts(clients: TrainingClients, cohort: int | str, base: str) -> Cohorts | None:
    """What trains the clients of a round together; None where one goes after the other.

    "auto" is many on a GPU, and one on a processor, where a larger batch takes as much longer.

    Args:
        clients: what trains one alone.
        cohort: the recipe's `engine.cohort`.
        base: the model, as messages name it.

    Raises:
        InputError: the model cannot keep several clients apart.
    """
    device = clients.bench.device
    size = cohort if isinstance(cohort, int) else AUTO if device.type != "cpu" else 1
    if size == 1:
        return None
    require_together(clients.bench, base)
    return Cohorts(clients, size)


def _grouped(clients: TrainingClients, asked: Sequence[Asked]) -> Iterator[list[int]]:
    """The clients that can train together, in groups; those without rows each in one of their own.

    Alike are the shapes of what they start from and the kinds that they train, the frozen residual, and, where the
    learning rate has a schedule, their number of steps. Of a group those with most steps are first.
    """
    groups: dict[Hashable, list[int]] = {}
    steps = [steps_per_round(clients.train, max(1, len(clients.data[brief.client].bins))) for brief, _ in asked]
    for number, (brief, memory) in enumerate(asked):
        header = brief.payload[8 : 8 + int.from_bytes(brief.payload[:8], "little")]
        key = (
            header,
            brief.payload if b'"residual/' in header else b"",
            tuple(sorted((name, kept.shape) for name, kept in own(memory).items())),
            tuple(sorted(brief.trains)),
            tuple(sorted(brief.scalings.items())),
            None if brief.blocks is None else len(brief.blocks),
            0 if is_constant(clients.train) else steps[number],
            number if not clients.data[brief.client].bins else -1,
        )
        groups.setdefault(key, []).append(number)
    for group in groups.values():
        yield sorted(group, key=lambda number: -steps[number])


def _short(error: Exception) -> bool:
    """Whether it says that memory ran out, in torch's words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in SHORT)
    )
