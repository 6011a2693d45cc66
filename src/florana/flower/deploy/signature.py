"""Who sends a request, by its headers alone: Flower's signature of the time, checked before a byte of the body is read.

    headers: public key (PEM, base64), time (ISO 8601), signature of the time by that key (base64)

The fleet API behind the gateway checks the same again, and that the body speaks for that key's node. A signature holds
for five minutes, for whoever has it: what travels is inside TLS.
"""

from __future__ import annotations

import binascii
import datetime
from base64 import b64decode
from collections.abc import Iterable, Mapping

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature


class Unsigned(Exception):  # noqa: N818  (a verdict on a request)
    """The headers hold no signature that counts."""


class Unknown(Exception):  # noqa: N818  (a verdict on a request)
    """The headers are signed, by a key that is not approved."""


def signer(headers: Iterable[tuple[bytes, bytes]], approved: Mapping[bytes, str]) -> str:
    """The client whose key signed the headers.

    Args:
        headers: names and values, as an ASGI scope has them.
        approved: public key (PEM) -> client.

    Raises:
        Unsigned: a header is missing, twice there, or not what it should be; the time is not now; or the signature is
            not of it.
        Unknown: the signature holds, but the key is not approved.
    """
    key, time, signature = (
        _only(headers, name) for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    )
    try:
        public = b64decode(key, validate=True)
        age = (now() - datetime.datetime.fromisoformat(time.decode("ascii"))).total_seconds()
        in_time = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
        if not (in_time and verify_signature(bytes_to_public_key(public), time, b64decode(signature, validate=True))):
            raise Unsigned
    except (ValueError, TypeError, binascii.Error):  # no base64, no time, no key
        raise Unsigned from None
    client = approved.get(public)  # once: the roster may change at any time
    if client is None:
        raise Unknown
    return client


def _only(headers: Iterable[tuple[bytes, bytes]], name: str) -> bytes:
    found = [value for key, value in headers if key.lower() == name.lower().encode()]
    if len(found) != 1:
        raise Unsigned
    return found[0]
