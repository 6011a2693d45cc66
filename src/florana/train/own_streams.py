"""Random numbers of several clients in one batch: each client's dropout draws from a generator of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ATTENTION = F.scaled_dot_product_attention
PLACES: Mapping[Callable[..., Any], tuple[str, int, float]] = {
    F.dropout: ("p", 1, 0.5),
    torch.dropout: ("p", 1, 0.0),
    ATTENTION: ("dropout_p", 4, 0.0),
}
"""What draws: the name of its rate, where it stands among the arguments, and what it is where not given."""


class OwnStreams(TorchFunctionMode):
    """While it is entered, what draws in a batch draws client by client, as each would alone.

    A client's numbers so depend on its seed and on the shape of its own rows, and on nobody beside it.

    Args:
        seeds: one of each client.
        device: of the model.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self._default = (
            torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        )
        self._own = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._here: list[int] = list(range(len(seeds)))
        self._alone: int | None = None
        self.drawn = False
        """Whether anything was drawn yet."""

    def of(self, clients: Sequence[int]) -> None:
        """Whose rows the next batch holds, in their order and of each equally many; of one alone, drawn at once."""
        self._here = list(clients)

    @contextlib.contextmanager
    def alone(self, place: int) -> Iterator[None]:
        """Meanwhile the rows are those of one client of the batch."""
        self._alone = self._here[place]
        try:
            yield
        finally:
            self._alone = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PLACES or not _rate(func, args, kwargs):
            return func(*args, **kwargs)
        self.drawn = True
        if self._alone is not None or len(set(self._here)) == 1:
            return self._from(self._here[0] if self._alone is None else self._alone, func, args, kwargs)
        first = args[0] if args else kwargs["input" if func is not ATTENTION else "query"]
        rows, count = len(first), len(self._here)

        def part(value: Any, place: int) -> Any:
            own = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
            return value.chunk(count)[place] if own else value

        return torch.cat(
            [
                self._from(
                    client,
                    func,
                    [part(value, place) for value in args],
                    {name: part(value, place) for name, value in kwargs.items()},
                )
                for place, client in enumerate(self._here)
            ]
        )

    def _from(self, client: int, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call, with that client's numbers."""
        own = self._own[client]
        before = self._default.get_state()
        self._default.set_state(own.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            own.set_state(self._default.get_state())
            self._default.set_state(before)


def _rate(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """The dropout of a call; 0 where it is not in training."""
    name, place, usual = PLACES[func]
    if func is not ATTENTION and not (args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))):
        return 0.0
    return float(args[place] if len(args) > place else kwargs.get(name, usual))
