"""A session's messages as JSON's own types, and back; what comes from elsewhere is taken apart with suspicion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from florana.secure.session import Public, Roster, Terms
from florana.secure.session_keys import PUBLIC, Refused

_LONGEST = 1 << 16
"""Characters of one hexadecimal word."""


def terms_to(terms: Terms) -> dict[str, Any]:
    """The terms of a session."""
    return {
        "session": terms.session,
        "run": terms.run,
        "round": terms.round,
        "attempt": terms.attempt,
        "trips": list(terms.trips),
        "bits": terms.bits,
        "most": terms.most,
        "minimum": terms.minimum,
    }


def terms_from(said: object) -> Terms:
    """The inverse of `terms_to`. Raises Refused."""
    facts = table(said, "terms")
    try:
        whole = {key: facts[key] for key in ("round", "attempt", "bits", "most", "minimum")}
        trips = list(facts["trips"])
        if facts.keys() != {*whole, "trips", "session", "run"} or not trips:
            raise ValueError("other keys")
        if not all(type(value) is int and 0 <= value < 2**31 for value in (*whole.values(), *trips)):
            raise ValueError("a number that is none")
        return Terms(text(facts["session"]), text(facts["run"]), trips=tuple(sorted(set(trips))), **whole)
    except (KeyError, TypeError, ValueError) as error:
        raise Refused("the terms of a session are damaged", why=f"{type(error).__name__}: {error}") from None


def public_to(public: Public) -> dict[str, Any]:
    """What a client shows of itself."""
    return {
        "sealing": public.sealing.hex(),
        "masking": {str(trip): key.hex() for trip, key in public.masking.items()},
        "signature": public.signature.hex(),
    }


def public_from(said: object) -> Public:
    """The inverse of `public_to`. Raises Refused."""
    facts = table(said, "keys")
    if facts.keys() != {"sealing", "masking", "signature"}:
        raise Refused("a client's keys are damaged")
    masking = {number(trip): word(key, PUBLIC) for trip, key in table(facts["masking"], "keys").items()}
    return Public(word(facts["sealing"], PUBLIC), masking, word(facts["signature"]))


def roster_from(said: object) -> Roster:
    """Client -> what it shows. Raises Refused."""
    return {text(name): public_from(public) for name, public in table(said, "roster").items()}


def words_to(words: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes by name, hexadecimal."""
    return {name: content.hex() for name, content in words.items()}


def words_from(said: object) -> dict[str, bytes]:
    """The inverse of `words_to`. Raises Refused.

    Examples:
        >>> words_from(words_to({"a": b"xy"}))
        {'a': b'xy'}
    """
    return {text(name): word(content) for name, content in table(said, "table").items()}


def names_from(said: object) -> list[str]:
    """A list of names. Raises Refused."""
    if not isinstance(said, list):
        raise Refused("a list of names is none")
    return [text(name) for name in said]


def bounds_from(said: object) -> dict[str, float]:
    """Bounds by name: finite, not negative. Raises Refused."""
    found = table(said, "bounds")
    for value in found.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise Refused("a bound is no number that a change can have")
    return {text(name): float(value) for name, value in found.items()}


def number(said: object) -> int:
    """A whole number of a trip. Raises Refused."""
    value = int(said) if isinstance(said, str) and said.isascii() and said.isdecimal() and len(said) < 4 else said
    if type(value) is not int or not 0 <= value < 1000:
        raise Refused("the number of a trip is none")
    return value


def word(said: object, size: int | None = None) -> bytes:
    """Hexadecimal bytes, so many where a size is given. Raises Refused."""
    try:
        if not isinstance(said, str) or len(said) > _LONGEST:
            raise ValueError
        content = bytes.fromhex(said)
    except ValueError:
        raise Refused("a word of a message is damaged") from None
    if size is not None and len(content) != size:
        raise Refused("a word of a message has another size")
    return content


def text(said: object) -> str:
    """A short text. Raises Refused."""
    if not isinstance(said, str) or not said or len(said) > 200:
        raise Refused("a name in a message is none")
    return said


def table(said: object, what: str) -> Mapping[str, Any]:
    """A table. Raises Refused."""
    if not isinstance(said, Mapping):
        raise Refused(f"a message has no {what}")
    return said
