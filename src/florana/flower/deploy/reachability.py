"""The way to the server, tried once: is it there, and is its certificate the invitation's?"""

from __future__ import annotations

import email.utils
import socket
import ssl
import time
from datetime import UTC, datetime

from florana.errors import FederationError
from florana.flower.deploy.gateway import trusting
from florana.flower.deploy.invitation import Invitation


def clock_difference(invitation: Invitation, seconds: float = 10.0) -> float:
    """Seconds by which this machine's clock is ahead of the server's, 0 where it does not tell.

    An answer shows that the server is there.

    Raises:
        FederationError: the certificate is not valid, or not for this host, or not of the invitation's authority.
        OSError: the server is not reached.
    """
    try:
        with (
            socket.create_connection((invitation.host, invitation.port), timeout=seconds) as plain,
            trusting(invitation.authority).wrap_socket(plain, server_hostname=invitation.host) as secure,
        ):
            secure.sendall(f"GET / HTTP/1.1\r\nHost: {invitation.host}\r\nConnection: close\r\n\r\n".encode())
            head = secure.recv(65_536).decode("latin-1")
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"the certificate of {invitation.address} does not hold",
            why=f"{error.verify_message}; by this machine's clock it is {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            fix="is this machine's clock right? else ask the operator for a new invitation",
        ) from None
    date = next((line[5:].strip() for line in head.splitlines() if line.lower().startswith("date:")), "")
    try:
        return time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):  # none, or not a date: signatures will tell
        return 0.0


def in_words(difference: float) -> str:
    """A difference of clocks as a person says it.

    Examples:
        >>> in_words(3600.2), in_words(-120.0)
        ("3600 seconds ahead of the server's", "120 seconds behind the server's")
    """
    return f"{abs(difference):.0f} seconds {'behind' if difference < 0 else 'ahead of'} the server's"
