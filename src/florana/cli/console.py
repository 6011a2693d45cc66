"""Where tables and lines go: a console that takes what it is given for text."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from florana.displayable import displayable


def console_of(as_json: bool, width: int = 140) -> Console | None:
    """Where to print: the terminal, a page of `width` columns where there is none, or nowhere (`--json`)."""
    return None if as_json else PlainConsole(width=None if sys.stdout.isatty() else width, markup=False, emoji=False)


class PlainConsole(Console):
    """rich's console without markup, and with what is no visible character as its escape."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed comes by here, those in the cells of tables too."""
        return super().render_str(displayable(text, most=100_000, keep="\n"), **options)
