"""Lines for a person, on the terminal: whatever they quote is made displayable first."""

from __future__ import annotations

import typer

from florana.displayable import displayable

MOST = 20_000
"""Characters of one message."""


def say(text: object, *, err: bool = False, color: str | None = None) -> None:
    """Print a message of one or several lines.

    Args:
        text: the message.
        err: to standard error.
        color: a terminal's name of one.
    """
    typer.secho(displayable(text, MOST, keep="\n"), fg=color, err=err)
