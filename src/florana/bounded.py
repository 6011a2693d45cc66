"""Files from elsewhere, read within bounds: a small file can hold what takes a parser all memory, or hours.

Each reader here looks at the size, and at what makes the parser behind it slow, before that parser sees a byte.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOML_BYTES = 2**20
JSON_BYTES = 2**24
DEPTH = 64
"""Tables in tables, lists in lists, and parts of a dotted key: tomllib takes the square of these in time and memory."""
MANY = 200_000
"""Keys, values and lines of one file of settings."""

_TEXTS = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?(?:\"{3}|\Z)|'{3}.*?(?:'{3}|\Z)|"(?:\\.|[^"\\\n])*+"?|'[^'\n]*+'?|#[^\n]*+""", re.DOTALL
)
"""Texts and comments of TOML; one without an end too, so that no place is looked at twice."""
_DOTTED = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{DEPTH}}}")


def read_bytes(path: Path, most: int) -> bytes:
    """A file's bytes. Raises OSError, and ValueError where there are more than `most`, or it is no file."""
    if not path.is_file() and path.exists():  # a pipe would be waited for
        raise ValueError("it is no file")
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a table. Raises OSError, and ValueError as `toml`."""
    return toml(read_bytes(path, TOML_BYTES).decode("utf-8"))


def toml(text: str) -> dict[str, Any]:
    """TOML text as a table.

    Args:
        text: at most `TOML_BYTES` characters.

    Raises:
        ValueError: it is no TOML (`tomllib.TOMLDecodeError`), or it is too large or too deep to be read safely.

    Examples:
        >>> toml("a.b = 1")
        {'a': {'b': 1}}
    """
    if len(text) > TOML_BYTES:
        raise ValueError(f"it has more than {TOML_BYTES} characters")
    plain = _TEXTS.sub("t", text)
    if _DOTTED.search(plain):
        raise ValueError(f"a key has more than {DEPTH} parts")
    _require_shallow(plain)
    if plain.count("=") + plain.count(",") > MANY:
        raise ValueError(f"it has more than {MANY} values")
    return tomllib.loads(text)


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None, most: int = JSON_BYTES) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        pairs: makes a table of its keys and values; `dict` if None.
        most: bytes of the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or too large or too deep to be read safely.
    """
    return json_of(read_bytes(path, most).decode("utf-8"), pairs)


def json_of(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text says: `json.loads`, which answers a deep one with a RecursionError that nobody expects.

    Args:
        text: one value. Brackets in its words do not count as depth.
        pairs: makes a table of its keys and values; `dict` if None.

    Raises:
        ValueError: it is no JSON, or nested too deep to be read safely.

    Examples:
        >>> json_of(b'{"a": [1]}')
        {'a': [1]}
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def unpacked(content: bytes, most: int) -> bytes:
    """gzip's content. Raises ValueError where it has more than `most` bytes; OSError, EOFError where it is damaged."""
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        found = stream.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it has more than {most} bytes when it is unpacked")
    return found


def _require_shallow(text: str) -> None:
    depth = most = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        most = max(most, depth)
    if most > DEPTH:
        raise ValueError(f"it is nested deeper than {DEPTH}")
