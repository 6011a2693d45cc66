"""The default engine: every client in this process, one after the other, sharing one base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from florana.displayable import log
from florana.errors import FloranaError
from florana.federation.messages import Brief, Failure, Reply

Memory = Mapping[str, Tensor]
"""The state of one client."""

Fit = Callable[[Brief, Memory], tuple[Reply, Memory]]
"""One client's round: the brief and its own memory in, the reply and the next memory out."""


class LocalEngine:
    """Runs `fit` for one brief after the other.

    A client that cannot train (a FloranaError: its loss diverged, it has no rows) becomes a Failure with its reason.
    Any other exception in the first round is a fault of florana or of the recipe: the run ends with it, before anything
    is committed. In a later round, where clients have trained before, it is a Failure too, its traceback in the log.
    The memories are replaced, never changed in place, so that what was committed stays what it was.
    """

    def __init__(self, fit: Fit, memories: Mapping[str, Memory] | None = None) -> None:
        self._fit = fit
        self._memories: dict[str, Memory] = dict(memories or {})

    def memories(self) -> Mapping[str, Memory]:
        """Client name -> what it keeps; clients that keep nothing are left out."""
        return {client: memory for client, memory in self._memories.items() if memory}

    def fit(self, briefs: Sequence[Brief]) -> Iterator[Reply | Failure]:
        """The clients' answers, in the order of the briefs."""
        for brief in briefs:
            try:
                reply, memory = self._fit(brief, self._memories.get(brief.client, {}))
            except FloranaError as error:
                yield Failure(brief.client, str(error).replace("\n", "; "))
            except Exception as error:
                if brief.round == 1:
                    error.add_note(f"client '{brief.client}' failed so in the first round")
                    raise
                log.exception("client %s failed in round %d", brief.client, brief.round)
                yield Failure(brief.client, f"{type(error).__name__}: {error}".splitlines()[0])
            else:
                self._memories[brief.client] = memory
                yield reply
