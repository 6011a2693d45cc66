"""Connections that have not shown an approved key yet: few of them, and not for long.

uvicorn's own protocol, with a place in a queue: a connection leaves it when a signature held on it, is closed when it
has not shown one in `SECONDS`, and the oldest is closed where there are more than `MOST`. So whoever has no key cannot
use up what others need, and a site is not kept out by those who wait before it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 256
"""Connections without a key at once."""
SECONDS = 10.0
"""For a handshake, and again from there to a request with a signature that holds."""

Address = tuple[str, int]


class Waiting:
    """The connections without a key, the oldest first."""

    def __init__(self) -> None:
        self._by_address: OrderedDict[Address, asyncio.Transport] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_address)

    def came(self, address: Address, transport: asyncio.Transport) -> None:
        """A connection is new."""
        self._by_address[address] = transport
        while len(self._by_address) > MOST:
            _, oldest = self._by_address.popitem(last=False)
            oldest.abort()

    def proved(self, address: Address | None) -> None:
        """It showed an approved key, or is gone."""
        if address is not None:
            self._by_address.pop(address, None)

    def late(self, address: Address) -> None:
        """Its time is over."""
        transport = self._by_address.pop(address, None)
        if transport is not None:
            transport.abort()


def protocol_with(waiting: Waiting) -> type[H11Protocol]:
    """uvicorn's protocol, of connections that wait in that queue."""

    class Queued(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if self.client is not None:
                waiting.came(self.client, transport)
                self.loop.call_later(SECONDS, waiting.late, self.client)

        def connection_lost(self, exc: Exception | None) -> None:
            waiting.proved(self.client)
            super().connection_lost(exc)

    return Queued


def address_of(scope: Mapping[str, Any]) -> Address | None:
    """Where a request comes from: host and port."""
    client = scope.get("client")
    return None if client is None else (str(client[0]), int(client[1]))
