"""The authority of a federation: its key signs the server's certificate and the roster, and need not lie at the server.

    FED/ca.crt     what sites check the server by, and everyone the roster       valid for ten years
    FED/ca.key     or wherever it is kept, under a passphrase or not             needed to approve, revoke and renew
    FED/server.crt, server.key     what `florana serve` shows                    valid for a year, renewed by `ca.key`

So who may approve sites (has the authority's key) and who may run the server (has the server's) are told apart.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from florana.atomic_files import replace_file
from florana.errors import InputError, RecipeError
from florana.flower.deploy.keys import Certificates, read_certificate, write_private

DAYS = 365
"""How long a server's certificate is valid."""
AUTHORITY_DAYS = 3650
"""How long an authority is: server certificates are renewed below it, and invitations stay as they are."""


@dataclass(frozen=True)
class AuthorityKey:
    """Where the authority's private key is, and what opens it.

    Args:
        path: the file.
        passphrase: of the key; None for a key that is not encrypted.
    """

    path: Path
    passphrase: bytes | None = None

    def read(self, authority: Path) -> ec.EllipticCurvePrivateKey:
        """The key, which must be the one of the certificate `authority`.

        Raises:
            InputError: it is not there, cannot be read, is not opened by the passphrase, or is another authority's.
        """
        try:
            key = load_pem_private_key(self.path.read_bytes(), self.passphrase)
        except FileNotFoundError:
            raise InputError(
                f"the authority's key is not at {self.path}",
                why="it signs the roster and the server's certificate",
                fix="say where it is kept: --authority-key FILE",
            ) from None
        except TypeError as error:  # a passphrase that is missing, or one too many
            fix = "--passphrase-file FILE" if self.passphrase is None else "leave --passphrase-file out"
            raise InputError(f"the authority's key {self.path} cannot be opened", why=str(error), fix=fix) from None
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            why = "the passphrase is wrong, or the file is damaged" if self.passphrase else str(error)
            raise InputError(f"the authority's key {self.path} cannot be opened", why=why) from None
        public = read_certificate(authority).public_key()
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != public:
            raise InputError(f"{self.path} is not the key of {authority}", fix="name this federation's authority")
        return key


def own_key(files: Certificates) -> AuthorityKey:
    """The authority's key where `make_server` puts it, not encrypted."""
    return AuthorityKey(files.folder / "ca.key")


def make_server(
    folder: Path,
    hosts: Sequence[str],
    days: int = DAYS,
    now: dt.datetime | None = None,
    authority: AuthorityKey | None = None,
) -> Certificates:
    """An authority, and a certificate of it for `hosts` (names or addresses), valid on this machine too.

    Args:
        folder: the operator's, a new one.
        hosts: the server's names and addresses.
        days: how long the server's certificate is valid; the authority is for ten years, or as long if that is more.
        now: the time to count from; None for the clock's.
        authority: where the authority's key is written, and its passphrase; None for `ca.key` in the folder.

    Raises:
        RecipeError: the folder or the key's place has some already, or a host is neither a name nor an address.
    """
    files = Certificates(folder)
    kept = authority or own_key(files)
    if taken := next((path for path in (files.authority, kept.path) if path.exists()), None):
        raise RecipeError(f"{taken} exists already", fix="name a new folder; an authority is never replaced")
    names = [_alternative(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    begin = _begin(now)
    key, name = ec.generate_private_key(ec.SECP384R1()), _name("florana federation authority")
    end = begin + dt.timedelta(days=max(days, AUTHORITY_DAYS))
    own = (
        _certificate(name, name, key.public_key(), begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    folder.mkdir(parents=True, exist_ok=True)
    kept.path.parent.mkdir(parents=True, exist_ok=True)
    lock: KeySerializationEncryption = NoEncryption()
    if kept.passphrase is not None:
        lock = BestAvailableEncryption(kept.passphrase)
    write_private(kept.path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    replace_file(files.authority, own.public_bytes(Encoding.PEM))
    _certify(files, key, own, names, begin, days)
    return files


def renew(
    files: Certificates,
    days: int = DAYS,
    also: Sequence[str] = (),
    now: dt.datetime | None = None,
    authority: AuthorityKey | None = None,
) -> dt.datetime:
    """A new key and certificate of the server, below the same authority: invitations stay as they are.

    Args:
        files: the operator's folder, with a certificate, valid or not.
        days: how long the new one is valid; the authority's end is the last day.
        also: names and addresses beside those of the old one.
        now: the time to count from; None for the clock's.
        authority: the authority's key; None for `ca.key` in the folder.

    Returns:
        The end of the new certificate.

    Raises:
        InputError: a certificate or the authority's key is missing, or the authority has come to its end.
        RecipeError: a host is neither a name nor an address.
    """
    key = (authority or own_key(files)).read(files.authority)
    own, begin = read_certificate(files.authority), _begin(now)
    if begin >= own.not_valid_after_utc:
        raise InputError(
            f"{files.authority} was valid until {own.not_valid_after_utc:%Y-%m-%d}",
            fix="make a new federation with 'florana flower keys --server', and new invitations",
        )
    before = read_certificate(files.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    more = [_alternative(host) for host in also]
    return _certify(files, key, own, list(dict.fromkeys([*before, *more])), begin, days)


def _certify(
    files: Certificates,
    key: ec.EllipticCurvePrivateKey,
    own: x509.Certificate,
    names: list[x509.GeneralName],
    begin: dt.datetime,
    days: int,
) -> dt.datetime:
    """Write a new key of the server, and its certificate; the old key stays until the new one is whole."""
    private = ec.generate_private_key(ec.SECP384R1())
    end = min(begin + dt.timedelta(days=days), own.not_valid_after_utc)
    host = next(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress))
    signed = (
        _certificate(_name(host), own.subject, private.public_key(), begin, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    fresh = files.key.with_name(".server.key.new")
    fresh.unlink(missing_ok=True)
    write_private(fresh, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    fresh.replace(files.key)
    replace_file(files.certificate, signed.public_bytes(Encoding.PEM))
    return end


def _begin(now: dt.datetime | None) -> dt.datetime:
    """Five minutes ago: clocks differ a little."""
    return (now or dt.datetime.now(dt.UTC)) - dt.timedelta(minutes=5)


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
