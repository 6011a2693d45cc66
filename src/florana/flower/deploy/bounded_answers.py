"""What a site takes of its server's answers: so many bytes, as they are, and from the server alone.

Flower's client follows redirects, unpacks what comes packed and keeps a whole answer in memory, however large. So a
server that was taken over could have a site ask other machines of its own house, or fill its memory with a few bytes.
Flower lets interceptors stand between its client and the line: this one is the innermost, and asks for itself.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import httpx
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from florana.errors import FederationError
from florana.lora.factors import Adapter

ONE = 2**26
"""Bytes of one answer; Flower cuts tensors into pieces of 5 MiB."""
_BEGINS, _PIECE = "/PullMessages", "/PullObject"


@dataclass(eq=False)
class BoundedAnswers:
    """An interceptor of Flower's that sends a request by a client of its own, and reads no more than is allowed.

    Args:
        client: asks; it trusts the invitation's authority alone.
        most: bytes that all pieces of one of the server's requests may have.
    """

    client: httpx.Client
    most: int
    _taken: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """The answer, read whole.

        Raises:
            FederationError: it is a redirect, it is packed, or it is too large.
            TransportError: the line broke (httpx).
        """
        request = context.request
        request.headers["accept-encoding"] = "identity"
        response = self.client.send(request, stream=True, follow_redirects=False)
        try:
            if response.is_redirect:
                raise FederationError(
                    "the server sends this site to another place, and it does not go there",
                    fix="ask the operator; a proxy in between must pass requests on as they are",
                )
            if response.headers.get("content-encoding", "identity") != "identity":
                raise FederationError("the server's answer is packed", why="a small one could fill this site's memory")
            content = bytearray()
            for part in response.iter_raw():
                content += part
                if len(content) > ONE:
                    raise FederationError(f"the server's answer has more than {ONE} bytes")
        finally:
            response.close()
        self._count(context.rpc_method, len(content))
        return httpx.Response(response.status_code, headers=response.headers, content=bytes(content), request=request)

    def _count(self, method: str, size: int) -> None:
        with self._lock:  # Flower fetches pieces in several threads
            if method.endswith(_BEGINS):
                self._taken = 0
            if method.endswith(_PIECE):
                self._taken += size
            if self._taken > self.most:
                raise FederationError(
                    f"the server's request has more than {self.most} bytes",
                    why="that is four times what the adapted layers weigh, and at least 1 GiB: no method sends as much",
                )


def largest_request(start: Adapter) -> int:
    """Bytes that a request may have: four times the adapted layers in float32, and at least 1 GiB.

    Args:
        start: the adapter before the first round.

    Examples:
        >>> import torch
        >>> from florana.lora.factors import LoraFactors
        >>> largest_request(Adapter({"q": LoraFactors(torch.ones(4, 1), torch.ones(1, 3), 1.0)})) == 2**30
        True
    """
    layers = sum(4 * out * into for out, into in (pair.shape for pair in start.modules.values()))
    return max(2**30, 4 * layers)
