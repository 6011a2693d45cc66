"""Key pairs of sites, and the names of an operator's files.

    FED/ca.crt ca.key server.crt server.key roster.json        SITE/<name>.key <name>.pub

A site's private key is made at the site and never leaves it; the operator gets the .pub file. Node keys are EC P-384
in OpenSSH's form, which is what Flower reads. A key that takes an older one's place is signed by it:

    ecdsa-sha2-nistp384 AAAA... hospital-a
    signed-by-the-key-before MGUC...
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from florana.atomic_files import replace_file
from florana.bounded import read_bytes
from florana.errors import InputError, RecipeError
from florana.flower.deploy.signing import sign

BEFORE = "signed-by-the-key-before "
"""How the second line of a .pub file begins, whose key takes another one's place."""
CERTIFICATE_BYTES = 2**20
PUBLIC_BYTES = 2**14
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Certificates:
    """The files of an operator's folder."""

    folder: Path

    @property
    def authority(self) -> Path:
        """What the sites check the server by."""
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The server's own certificate."""
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        """The server's private key."""
        return self.folder / "server.key"

    @property
    def roster(self) -> Path:
        """The approved sites and their public keys."""
        return self.folder / "roster.json"


@dataclass(frozen=True)
class PublicKey:
    """A site's .pub file.

    Args:
        name: the site's.
        key: the key (PEM).
        line: the file's first line: name and key.
        before: of a key that takes another one's place, that one's signature of the line; empty otherwise.
    """

    name: str
    key: bytes
    line: bytes
    before: bytes = b""


def make_site(folder: Path, name: str) -> tuple[Path, Path]:
    """A site's key pair: the private key (readable by its owner alone) and the public one, which carries the name.

    Raises:
        RecipeError: the name is none, or the key exists.
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"'{name}' is no name for a site", fix="letters, digits, dots, dashes and underscores; at most 64"
        )
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    if private.exists():
        raise RecipeError(
            f"{private} exists already", fix="name another folder, or put a new key in its place with --rotate"
        )
    folder.mkdir(parents=True, exist_ok=True)
    content, line = _pair(name)
    write_private(private, content)
    replace_file(public, line)
    return private, public


def rotate_site(folder: Path, name: str) -> tuple[Path, Path]:
    """A new key pair in the place of a site's own, signed by the key before, which is kept as `<name>.key-before`.

    Args:
        folder: the site's.
        name: the site's.

    Returns:
        The new private key, and the public one.

    Raises:
        InputError: the site has no key of that name that can be read.
        RecipeError: a key that was replaced is still there: its own replacement may not have been approved yet.
    """
    who, private = read_private(folder)
    if who != name:
        raise InputError(f"the site folder {folder} holds the key of '{who}'", fix=f"name '{who}', or another folder")
    kept, public = folder / f"{name}.key-before", folder / f"{name}.pub"
    if kept.exists():
        raise RecipeError(
            f"{kept} is still there",
            why="the operator may know that key alone, and only it can sign the next one",
            fix=f"once {public} is approved, remove {kept.name}; to go back, put it in {private.name}'s place",
        )
    old = load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(old, ec.EllipticCurvePrivateKey)
    content, line = _pair(name)
    proof = base64.b64encode(sign(old, line.strip()))
    fresh = folder / f".{name}.new"
    fresh.unlink(missing_ok=True)
    write_private(fresh, content)
    kept.hardlink_to(private)
    replace_file(public, line + BEFORE.encode() + proof + b"\n")
    fresh.replace(private)
    return private, public


def read_public(path: Path) -> PublicKey:
    """The name and the key in a site's .pub file. Raises InputError."""
    try:
        line, _, rest = read_bytes(path, PUBLIC_BYTES).strip().partition(b"\n")
        key = load_ssh_public_key(line)
        name, second = line.split()[2].decode(), rest.decode("ascii").strip()
        before = base64.b64decode(second.removeprefix(BEFORE), validate=True) if second.startswith(BEFORE) else b""
    except (OSError, ValueError, IndexError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is no public key of a site", why=str(error), fix=_MAKE) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _NAME.fullmatch(name):
        raise InputError(f"{path} is no public key of a site", why="not an EC key with a name", fix=_MAKE)
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(name, pem, line.strip(), before)


def read_private(folder: Path) -> tuple[str, Path]:
    """The name and the private key file of a site's folder.

    Raises:
        InputError: there is not exactly one key, it cannot be read, or others may read it.
    """
    found = sorted(folder.glob("*.key")) if folder.is_dir() else []
    if len(found) != 1:
        what = "no key" if not found else f"{len(found)} keys"
        raise InputError(f"the site folder {folder} holds {what}", fix=_MAKE)
    path = found[0]
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is no private key of a site", why=str(error), fix=_MAKE) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path} is no private key of a site", why="not an EC key", fix=_MAKE)
    if path.stat().st_mode & 0o077:
        raise InputError(f"{path} can be read by others", fix=f"chmod 600 {path}")
    return path.stem, path


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate of an operator's folder or an invitation. Raises InputError."""
    try:
        return x509.load_pem_x509_certificate(read_bytes(path, CERTIFICATE_BYTES))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no certificate", why=str(error)) from None


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that others can never read, not even for a moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


_MAKE = "make one with 'florana flower keys NAME --out FOLDER'"


def _pair(name: str) -> tuple[bytes, bytes]:
    """A new private key, and the line of its public one."""
    key = ec.generate_private_key(ec.SECP384R1())
    text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), text + b" " + name.encode() + b"\n"
