"""The roster: the approved sites with their public keys, and the training rows that the operator approved.

FED/roster.json    {"clients": {name: {"key": base64 of PEM, "rows": count}}}
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

from florana.atomic_files import replace_file
from florana.bounded import read_json
from florana.errors import InputError, RecipeError, nearest
from florana.flower.deploy.keys import Certificates, read_public


def approve(files: Certificates, public: Path, rows: int | None = None) -> str:
    """Put a site's public key on the roster, and how many training rows it is to have; returns the site's name.

    Args:
        files: the operator's folder.
        public: the site's .pub file.
        rows: how many training rows the site has; None leaves the count as it is on the roster. A site without one is
            believed at its first registration.

    Raises:
        InputError: the file is no such key.
        RecipeError: the name or the key is taken.
    """
    name, key = read_public(public)
    roster = read_roster(files.roster)
    for known, other in roster.items():
        if known == name and other != key:
            raise RecipeError(f"'{name}' is approved already, with another key", fix="the site needs a name of its own")
        if known != name and other == key:
            raise RecipeError(f"the key in {public} is approved already, as '{known}'", fix="one key per site")
    counts = read_rows(files.roster) | ({} if rows is None else {name: rows})
    _write_roster(files.roster, roster | {name: key}, counts)
    return name


def revoke(files: Certificates, name: str) -> None:
    """Take a site off the roster: a server that is running refuses its next request. Its name is free for a new key.

    Args:
        files: the operator's folder.
        name: the site's.

    Raises:
        InputError: the roster cannot be read.
        RecipeError: the site is not on it.
    """
    roster = read_roster(files.roster)
    if name not in roster:
        raise RecipeError(f"'{name}' is not on the roster {files.roster}", fix=nearest(name, roster) if roster else "")
    del roster[name]
    _write_roster(files.roster, roster, read_rows(files.roster))


def _write_roster(path: Path, roster: Mapping[str, bytes], counts: Mapping[str, int]) -> None:
    entries = {
        client: {"key": base64.b64encode(content).decode()} | ({"rows": counts[client]} if client in counts else {})
        for client, content in roster.items()
    }
    replace_file(path, (json.dumps({"clients": dict(sorted(entries.items()))}, indent=1) + "\n").encode())


def read_roster(path: Path) -> dict[str, bytes]:
    """Client -> its public key as Flower tells it (PEM); empty where nobody was approved yet. Raises InputError."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        return {str(client): base64.b64decode(entry["key"]) for client, entry in content["clients"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the roster {path} cannot be read", why=f"{type(error).__name__}: {error}") from None


def read_rows(path: Path) -> dict[str, int]:
    """Client -> the training rows that the operator approved, of those where one was given. Raises InputError."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        return {str(client): int(entry["rows"]) for client, entry in content["clients"].items() if "rows" in entry}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the roster {path} cannot be read", why=f"{type(error).__name__}: {error}") from None
