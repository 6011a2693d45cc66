"""Three hundred strings that somebody else may send, and what of them must never reach a terminal."""

from __future__ import annotations

import unicodedata

KINDS = {
    "markup": ["[/nope]", "[bold red]", "[link=http://x.test]y[/link]", "[[", "[@click=app.bell]z", "[/]", ":boom:"],
    "terminal": ["\x1b[2J", "\x1b]0;title\x07", "\x1b[31m", "\x1bc", "\x9b2J", "\x90q\x9c", "\x1b[8m", "\x1b]8;;u\x07"],
    "questions": ["\x1b[6n", "\x1bP$q\x1b\\", "\x05"],  # a terminal answers them, as if somebody had typed it
    "control": ["\x00", "\x07", "\x08\x08\x08", "\x7f", "\x0b", "\x0c", "\x85", "\r", "\x1a", "\x04"],
    "lines": ["\n", "\r\n", "\u2028", "\u2029", "\n\nerror: gone\n", "\nhospital-b is here: 9 rows"],
    "direction": ["\u202e", "\u202d", "\u2066", "\u2067", "\u2068", "\u2069", "\u200f", "\u061c", "\u202b"],
    "hidden": ["\u200b", "\u200d", "\ufeff", "\u00ad", "\u2060", "\u3164", "\u034f", "\ufe0f", "\U000e0041", "\u180e"],
    "annotations": ["\ufff9", "\u206a", "\U0001d173"],
    "piles": ["a" + "\u0301" * 40, "\u0489" * 20, "e" + "\u20dd" * 9],
    "surrogates": ["\ud800", "\udfff", "\udc80"],
    "private": ["\ue000", "\U000f0000", "\U0010fffd", "\ufdd0", "\uffff"],
    "formats": [
        "%s%s%n",
        "{0.__class__}",
        "{{7*7}}",
        "${HOME}",
        "$\\frac{",
        "<script>alert(1)</script>",
        "&lt;b",
        "\\",
    ],
    "long": ["x" * 100_000, "\x1b" * 5_000, "\u202e" * 5_000],
}
FORMS = ["{}", "before {} after", "client-{}", "{}{}"]
STRINGS = [form.format(text, text) if form == "{}{}" else form.replace("{}", text)
           for texts in KINDS.values() for text in texts for form in FORMS]  # fmt: skip


def forbidden(shown: str, keep: str = "\n") -> str:
    """The characters of a screen that must not be there."""
    kinds = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join(c for c in shown if unicodedata.category(c) in kinds and c not in keep)
