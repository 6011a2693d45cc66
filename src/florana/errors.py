"""The errors a user can cause. Each says what happened, where, why, and what to do, and carries its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FloranaError(Exception):
    """Base of all errors that florana explains; `exit_code` is what the command line ends with.

    Args:
        what: what happened and where, in one sentence (file, client, module, shapes).
        why: the cause, where it is known.
        fix: what the user can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"why: {self.why}")
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(lines)


class RecipeError(FloranaError):
    """A wrong command, recipe, option or combination. Nothing was written."""

    exit_code = 2


class InputError(FloranaError):
    """A file, model or data set that cannot be read, or inputs that do not fit each other."""

    exit_code = 3


class FederationError(FloranaError):
    """The federation cannot go on: too few usable updates. What was committed stands."""

    exit_code = 4


class BudgetSpent(FederationError):  # noqa: N818  (what happened, and no fault)
    """Another round would cost more than the privacy budget that is left. What was committed stands."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the known word closest to `word`, or all known words when none is close.

    Examples:
        >>> nearest("learning_rat", ["steps", "learning_rate"])
        "did you mean 'learning_rate'?"
    """
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known here: {', '.join(options)}"
