"""PEFT's patterns for module names (`rank_pattern`, `alpha_pattern`), matched in bounded time: they are untrusted.

PEFT asks Python's `re` whether `(.*\\.)?(KEY)$` matches the name of a module; the first key that does decides. `re`
goes back and tries again, so that a KEY such as `(a|aa)+` takes time exponential in the length of a name. Here RE2
answers: linear in the name, and bounded in memory. Only
what both libraries read alike is let through: no lookaround, back reference, flag, possessive or atomic piece, nested
set. PEFT's own patterns are names, dots, wildcards, alternatives, sets and counts; for those the answers are PEFT's.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import re2

from florana.errors import InputError

LONGEST = 1000
"""Characters of a pattern."""
SECONDS = 5.0
"""Of processor time for all patterns of one setting with all modules: a thousand of each take about one."""

_BOUNDED = re2.Options()
_BOUNDED.max_mem = 2**23
_BOUNDED.log_errors = False

_ESCAPED = r"\\[dDwWsS !-/:;=?@\[-`{-~]"
_SET = rf"\[\^?(?:(?!--|&&|~~|\|\|)[^\\\[\]]|{_ESCAPED})+\]"
_REPEATED = r"(?:[*+?]|\{\d+(?:,\d*)?\})(?:\?|(?!\+))"
_PIECE = re.compile(rf"[^\\\[\](){{}}*+?]|{_ESCAPED}|\\[bB]|{_SET}|{_REPEATED}|\((?:\?:|(?!\?))|\)")
"""One piece of a pattern that both libraries read alike."""


def by_pattern(
    patterns: Mapping[str, float], modules: Iterable[str], default: float, path: Path, setting: str
) -> dict[str, float]:
    """Module name -> the value of the first key that, as a regular expression, ends its name at a dot; else `default`.

    Args:
        patterns: key -> value, in PEFT's order.
        modules: module names.
        default: the value of a module that no key matches.
        path: the file that the patterns stand in, for messages.
        setting: the key that they stand under, for messages.

    Raises:
        InputError: a key is no regular expression, one that cannot be matched in bounded time, or too long; a module
            name beside patterns that is not printable ASCII; all of them together take too long.

    Examples:
        >>> patterns = {"q|v": 4, r"layer\\.[0-3]": 2}
        >>> by_pattern(patterns, ["layer.1", "layer.1.q", "qq"], 8, Path("c.json"), "rank_pattern")
        {'layer.1': 2, 'layer.1.q': 4, 'qq': 8}
    """
    found = dict.fromkeys(modules, default)
    left = list(found)
    where, until = f"{path}: '{setting}'", time.process_time() + SECONDS
    for name in left if patterns else ():
        if not (name.isascii() and name.isprintable()):
            raise InputError(f"{where} cannot be applied to the module {name!a}", why="its name is not plain text")
    for key, value in patterns.items():
        if not left:  # as PEFT: a key that is never asked for is never read
            break
        automaton, rest = _compiled(key, where), []
        for name in left:
            if automaton.fullmatch(name):
                found[name] = value
            else:
                rest.append(name)
            if time.process_time() > until:
                raise InputError(
                    f"{where}: matching its {len(patterns)} patterns with {len(found)} modules takes too long",
                    why=f"{SECONDS:g} s were over at {_short(key)}",
                    fix="name the modules plainly",
                )
        left = rest
    return found


def unmatched(pattern: str, modules: Iterable[str], path: Path, setting: str) -> list[str]:
    """The modules whose whole name the pattern does not match, as PEFT asks of a pattern in `target_modules`.

    Raises:
        InputError: as `by_pattern`.

    Examples:
        >>> unmatched(r".*\\.(q|v)", ["layer.1.q", "layer.1.k"], Path("c.json"), "target_modules")
        ['layer.1.k']
    """
    where, until = f"{path}: '{setting}'", time.process_time() + SECONDS
    automaton, left = _compiled(pattern, where, before=""), []
    for name in modules:
        if time.process_time() > until:
            raise InputError(f"{where}: matching {_short(pattern)} takes too long")
        if not automaton.fullmatch(name):
            left.append(name)
    return left


def _compiled(key: str, where: str, before: str = r"(?:.*\.)?") -> Any:
    """The automaton that accepts what PEFT's pattern of that key matches."""
    if len(key) > LONGEST:
        raise InputError(f"{where}: the pattern {_short(key)} has {len(key)} characters, more than {LONGEST}")
    place = 0
    while place < len(key):
        piece = _PIECE.match(key, place)
        if piece is None:
            raise _refused(key, where, f"from {_short(key[place:])} on, its meaning or its cost is not certain")
        place = piece.end()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python, on patterns whose meaning may change
            re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: the pattern {_short(key)} is not a regular expression", why=str(error)) from None
    try:
        return re2.compile(f"{before}(?:{key})", _BOUNDED)
    except re2.error as error:
        raise _refused(key, where, error.args[0].decode()) from None


def _refused(key: str, where: str, why: str) -> InputError:
    return InputError(
        f"{where}: the pattern {_short(key)} cannot be matched in bounded time",
        why=why,
        fix="write it with names, dots, wildcards, alternatives, sets and counts alone",
    )


def _short(value: str) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
