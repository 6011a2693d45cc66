"""Certificates and keys: an authority and a server certificate at the operator, a key pair at each site.

    FED/ca.crt ca.key server.crt server.key roster.json        SITE/<name>.key <name>.pub

A site's private key is made at the site and never leaves it; the operator gets the .pub file. Node keys are EC P-384
in OpenSSH's form, which is what Flower reads.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from florana.atomic_files import replace_file
from florana.errors import InputError, RecipeError

DAYS = 365
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


def make_server(folder: Path, hosts: Sequence[str], days: int = DAYS, now: dt.datetime | None = None) -> Certificates:
    """An authority, and a certificate of it for `hosts` (names or addresses), valid on this machine too.

    Raises:
        RecipeError: the folder has some already, or a host is neither a name nor an address.
    """
    files = Certificates(folder)
    if files.authority.exists():
        raise RecipeError(f"{files.authority} exists already", fix="name a new folder; certificates are never replaced")
    names = [_alternative(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    begin = (now or dt.datetime.now(dt.UTC)) - dt.timedelta(minutes=5)  # clocks differ a little
    end = begin + dt.timedelta(days=days)
    ca_key, ca_name = ec.generate_private_key(ec.SECP384R1()), _name("florana federation authority")
    ca = (
        _certificate(ca_name, ca_name, ca_key.public_key(), begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    key = ec.generate_private_key(ec.SECP384R1())
    server = (
        _certificate(_name(hosts[0]), ca_name, key.public_key(), begin, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    folder.mkdir(parents=True, exist_ok=True)
    for path, private in ((folder / "ca.key", ca_key), (files.key, key)):
        _write_private(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    replace_file(files.certificate, server.public_bytes(Encoding.PEM))
    replace_file(files.authority, ca.public_bytes(Encoding.PEM))
    return files


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
        raise RecipeError(f"{private} exists already", fix="keys are never replaced: name another folder")
    key = ec.generate_private_key(ec.SECP384R1())
    folder.mkdir(parents=True, exist_ok=True)
    _write_private(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    replace_file(public, text + b" " + name.encode() + b"\n")
    return private, public


def read_public(path: Path) -> tuple[str, bytes]:
    """The name and the key (PEM) in a site's .pub file. Raises InputError."""
    try:
        text = path.read_bytes()
        key = load_ssh_public_key(text)
        name = text.split()[2].decode()
    except (OSError, ValueError, IndexError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is no public key of a site", why=str(error), fix=_MAKE) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _NAME.fullmatch(name):
        raise InputError(f"{path} is no public key of a site", why="not an EC key with a name", fix=_MAKE)
    return name, key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def openssh(pem: bytes) -> bytes:
    """A public key of the roster as Flower's own command takes it."""
    return load_pem_public_key(pem).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


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
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no certificate", why=str(error)) from None


_MAKE = "make one with 'florana flower keys NAME --out FOLDER'"


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host):
        raise RecipeError(f"'{host}' is neither the name nor the address of a host", fix="for example fed.example.org")
    return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begin: dt.datetime, end: dt.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _write_private(path: Path, content: bytes) -> None:
    """Never readable by others, not even for a moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
