"""The default engine: every client on this machine, sharing one base model; one after the other, or side by side."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from torch import Tensor

from florana.displayable import log
from florana.errors import FloranaError
from florana.federation.messages import Brief, Failure, Reply, Step, failure_of

Memory = Mapping[str, Tensor]
"""The state of one client."""

Fit = Callable[[Brief, Memory], tuple[Reply, Memory]]
"""One client's round: the brief and its own memory in, the reply and the next memory out."""

Asked = tuple[Brief, Memory]
Outcome = tuple[Reply, Memory] | Exception
"""What came of one client's round."""

Each = Callable[[Sequence[Asked]], Generator[Outcome, None, None]]
"""All clients of a round: the outcomes in the order in which they were asked."""


def one_after_the_other(fit: Fit, asked: Sequence[Asked]) -> Generator[Outcome, None, None]:
    """Every client's outcome, each trained when the one before is done.

    Args:
        fit: one client's round.
        asked: a brief and the client's memory, of each client.
    """
    for brief, memory in asked:
        try:
            outcome: Outcome = fit(brief, memory)
        except Exception as error:
            outcome = error
        yield outcome


class LocalEngine:
    """Takes briefs to the clients of this machine.

    A client that cannot train (a FloranaError: its loss diverged, it has no rows) becomes a Failure with its reason.
    Any other exception in the first round is a fault of florana or of the recipe: the run ends with it, before anything
    is committed. In a later round, where clients have trained before, it is a Failure too, its traceback in the log.
    The memories are replaced, never changed in place, so that what was committed stays what it was.

    Args:
        fit: one client's round.
        memories: client -> what it keeps.
        each: all clients of a round; None: `fit` for one after the other.
        sealed: a client's answer to a step of a secure sum, where there are any.
    """

    def __init__(
        self,
        fit: Fit,
        memories: Mapping[str, Memory] | None = None,
        each: Each | None = None,
        sealed: Callable[[str, Step, Memory], Step] | None = None,
    ) -> None:
        self._sealed = sealed
        self._each = each or functools.partial(one_after_the_other, fit)
        self._memories: dict[str, Memory] = {client: kept for client, kept in (memories or {}).items() if kept}

    def memories(self) -> Mapping[str, Memory]:
        """Client name -> what it keeps; clients that keep nothing are left out."""
        return self._memories

    def remember(self, client: str, memory: Memory) -> None:
        """Put a client's memory in the place of what it kept."""
        self._memories[client] = memory

    def exchange(self, steps: Mapping[str, Step]) -> Iterator[tuple[str, Step | Failure]]:
        """The clients' answers to a step of a secure sum, in the order of the steps."""
        assert self._sealed is not None, "a recipe with secure sums has its clients' part"
        for client, step in steps.items():
            try:
                yield client, self._sealed(client, step, self._memories.get(client, {}))
            except FloranaError as error:
                yield client, failure_of(client, error)

    def fit(self, briefs: Sequence[Brief]) -> Iterator[Reply | Failure]:
        """The clients' answers, in the order of the briefs."""
        asked = [(brief, self._memories.get(brief.client, {})) for brief in briefs]
        with contextlib.closing(self._each(asked)) as outcomes:  # processes may hang on it
            for brief, outcome in zip(briefs, outcomes, strict=True):
                if isinstance(outcome, FloranaError):
                    yield failure_of(brief.client, outcome)
                elif isinstance(outcome, Exception):
                    if brief.round == 1:
                        outcome.add_note(f"client '{brief.client}' failed so in the first round")
                        raise outcome
                    log.error("client %s failed in round %d", brief.client, brief.round, exc_info=outcome)
                    yield Failure(brief.client, f"{type(outcome).__name__}: {outcome}".splitlines()[0])
                else:
                    reply, memory = outcome
                    if memory or brief.client in self._memories:
                        self._memories[brief.client] = memory
                    yield reply
