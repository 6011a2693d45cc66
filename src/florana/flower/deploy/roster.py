"""The roster: the approved sites with their public keys and approved training rows, signed by the authority.

FED/roster.json    {"clients": {name: {"key": base64 of PEM, "rows": count}}, "number": changes, "signature": ...}

Whoever reads it checks the signature by the `ca.crt` beside it, so that no one but the holder of the authority's key
can let a site in, take one off, or say how many rows one has: not who runs the server either.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_public_key

from florana.atomic_files import replace_file
from florana.bounded import read_json
from florana.errors import InputError, RecipeError, nearest
from florana.flower.deploy.authority import AuthorityKey, own_key
from florana.flower.deploy.keys import Certificates, PublicKey, read_certificate, read_public
from florana.flower.deploy.signing import sign, signed_by


@dataclass(frozen=True)
class Roster:
    """Who is approved.

    Args:
        keys: client -> its public key as Flower tells it (PEM).
        rows: client -> the training rows that the operator approved, of those where a number was given.
        number: how often the roster was changed; an older roster has a smaller one.
    """

    keys: dict[str, bytes] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    number: int = 0


def approve(
    files: Certificates, public: Path, rows: int | None = None, authority: AuthorityKey | None = None
) -> tuple[str, bool]:
    """Put a site's public key on the roster, and how many training rows it is to have.

    Args:
        files: the operator's folder.
        public: the site's .pub file.
        rows: how many training rows the site has; None leaves the count as it is on the roster. A site without one is
            believed at its first registration.
        authority: the authority's key; None for `ca.key` in the folder.

    Returns:
        The site's name, and whether its key took the place of one that was approved before.

    Raises:
        InputError: the file is no such key, or the authority's key cannot be had.
        RecipeError: the name or the key is taken, and the key is not signed by the one that it would replace.
    """
    given = read_public(public)
    roster = read_roster(files.roster)
    rotated = False
    for known, other in roster.keys.items():
        if known == given.name and other != given.key:
            _require_follows(given, other, public)
            rotated = True
        if known != given.name and other == given.key:
            raise RecipeError(f"the key in {public} is approved already, as '{known}'", fix="one key per site")
    counts = roster.rows | ({} if rows is None else {given.name: rows})
    after = replace(roster, keys=roster.keys | {given.name: given.key}, rows=counts)
    if after != roster or not files.roster.exists():
        write_roster(files, after, authority)
    return given.name, rotated


def revoke(files: Certificates, name: str, authority: AuthorityKey | None = None) -> None:
    """Take a site off the roster: a server that is running refuses its next request. Its name is free for a new key.

    Args:
        files: the operator's folder.
        name: the site's.
        authority: the authority's key; None for `ca.key` in the folder.

    Raises:
        InputError: the roster or the authority's key cannot be read.
        RecipeError: the site is not on it.
    """
    roster = read_roster(files.roster)
    if name not in roster.keys:
        fix = nearest(name, roster.keys) if roster.keys else ""
        raise RecipeError(f"'{name}' is not on the roster {files.roster}", fix=fix)
    keys = {client: key for client, key in roster.keys.items() if client != name}
    write_roster(files, replace(roster, keys=keys), authority)


def read_roster(path: Path) -> Roster:
    """The roster, after its signature was checked by `ca.crt` beside it; empty where nobody was approved yet.

    Raises:
        InputError: it cannot be read, or was changed by someone who does not have the authority's key.
    """
    if not path.exists():
        return Roster()
    try:
        content = read_json(path)
        clients = content["clients"]
        keys = {str(client): base64.b64decode(entry["key"]) for client, entry in clients.items()}
        rows = {str(client): int(entry["rows"]) for client, entry in clients.items() if "rows" in entry}
        roster = Roster(keys, rows, int(content.get("number", 0)))
        signature = base64.b64decode(str(content.get("signature", "")), validate=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the roster {path} cannot be read", why=f"{type(error).__name__}: {error}") from None
    authority = path.with_name("ca.crt")
    if not signed_by(read_certificate(authority).public_key(), _signed(roster), signature):
        raise InputError(
            f"the roster {path} is not signed by the authority {authority}",
            why="it was changed without the authority's key, or is of a florana before signed rosters",
            fix=f"move it away and approve each site's .pub file again: 'florana flower approve {path.parent} ...'",
        )
    return roster


def _require_follows(given: PublicKey, before: bytes, public: Path) -> None:
    """A site's new key must be signed by the one that is approved."""
    if not signed_by(load_pem_public_key(before), given.line, given.before):
        raise RecipeError(
            f"'{given.name}' is approved already, with another key",
            why=f"{public} is not signed by that key",
            fix="another site needs a name of its own; a new key in an old one's place is made by the site with "
            "'florana flower keys NAME --out SITE --rotate'; of a site that lost its key, revoke the old one first",
        )


def write_roster(files: Certificates, roster: Roster, authority: AuthorityKey | None = None) -> None:
    """Write the roster, with the next number and the authority's signature.

    Args:
        files: the operator's folder.
        roster: who is approved.
        authority: the authority's key; None for `ca.key` in the folder.

    Raises:
        InputError: the authority's key cannot be had.
    """
    key = (authority or own_key(files)).read(files.authority)
    after = replace(roster, number=roster.number + 1)
    content = {**_content(after), "signature": base64.b64encode(sign(key, _signed(after))).decode()}
    replace_file(files.roster, (json.dumps(content, indent=1) + "\n").encode())


def _content(roster: Roster) -> dict[str, Any]:
    rows = roster.rows
    clients = {
        client: {"key": base64.b64encode(key).decode()} | ({"rows": rows[client]} if client in rows else {})
        for client, key in sorted(roster.keys.items())
    }
    return {"clients": clients, "number": roster.number}


def _signed(roster: Roster) -> bytes:
    """What the signature is of: the roster in one spelling."""
    return b"florana roster\n" + json.dumps(_content(roster), sort_keys=True, separators=(",", ":")).encode()
