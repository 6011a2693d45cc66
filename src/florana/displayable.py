"""Text from elsewhere as text that may be shown: the one place through which names, reasons and messages reach people.

A failure reason of a site, a word of the server, the name of a module in a file: each may hold what turns a terminal
into something else (escape sequences), the order of a line round (bidirectional marks), or hides (characters without a
shape). All such characters are written as their escapes; a line stays one line, and has an end.
"""

from __future__ import annotations

import logging
import traceback
import unicodedata

LONGEST = 2000
"""Characters of one text that is shown."""

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SHAPELESS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_MARKS = 2
"""Combining marks upon one letter: more pile up over the lines around it."""


def displayable(text: object, most: int = LONGEST, keep: str = "") -> str:
    r"""The text with everything that is no plain visible character as an escape, cut to `most` characters.

    Args:
        text: whatever is to be shown.
        most: characters of the result; what is cut ends in an ellipsis.
        keep: characters that stay as they are, such as a newline in a text of several lines.

    Examples:
        >>> displayable("a\x1b[2Jb\n\u202ec")
        'a\\x1b[2Jb\\n\\u202ec'
    """
    plain = str(text)
    if not (plain.isascii() and plain.isprintable()):
        plain = _escaped(plain[: most + 1], keep)
    return plain if len(plain) <= most else plain[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _escaped(text: str, keep: str) -> str:
    parts, marks = [], 0
    for letter in text:
        kind = unicodedata.category(letter)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        hidden = kind in _HIDDEN or letter in _SHAPELESS or "\ufe00" <= letter <= "\ufe0f" or letter >= "\U000e0000"
        if (hidden and letter not in keep) or marks > _MARKS:
            parts.append(letter.encode("unicode_escape").decode())
        else:
            parts.append(letter)
    return "".join(parts)


class _Shown(logging.Filter):
    """Every record of florana's logger, its traceback too, as text that may be shown."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = displayable(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None and record.exc_text is None:
            told = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            record.exc_text = displayable(told, most=20 * LONGEST, keep="\n")
        return True


log = logging.getLogger("florana")
"""florana's one logger."""
log.addFilter(_Shown())
