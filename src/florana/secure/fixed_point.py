"""Numbers as whole numbers whose sums are exact: every client's change, times its rows, in one common grid.

    v_u = round(n_u d_u / (U n_max step))       d_u within +- bound,  n_u = min(rows, n_max)
    step = bound / (2^(bits - 1) - 1 - U / 2)   so that no sum over U clients leaves its range

    sum_u v_u step U n_max / sum_u n_u          is the weighted mean of the changes

Rounding moves a mean by at most step n_max U^2 / (2 sum n_u), and by far less as a rule, since roundings cancel. The
rows go along as digits, so that the server learns their sum alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from florana.errors import FederationError, FloranaError
from florana.secure.masks import Numbers, low

ROW_BITS = 32
"""Of the sum of rows, at most."""


@dataclass(frozen=True)
class Grid:
    """What all clients of a session have in common.

    Args:
        bits: of each number.
        clients: U, how many the roster has.
        most: n_max, the most rows that one client counts for; 1 where all count alike.
    """

    bits: int
    clients: int
    most: int

    def step(self, bound: float) -> float:
        """The size of one unit of a number within +- bound.

        Examples:
            >>> Grid(bits=16, clients=2, most=1).step(32766.0)
            1.0
        """
        return bound / float(2 ** (self.bits - 1) - 1 - self.clients / 2)

    @property
    def digit(self) -> int:
        """Bits of a digit of the rows: a sum of U of them stays within `bits`."""
        return self.bits - self.clients.bit_length()

    @property
    def digits(self) -> int:
        """How many of them there are."""
        return math.ceil(ROW_BITS / self.digit)


def count(shapes: Mapping[str, Sequence[int]], grid: Grid) -> int:
    """How many numbers a vector has."""
    return sum(math.prod(shape) for shape in shapes.values()) + grid.digits


def encoded(changes: Mapping[str, Tensor], bounds: Mapping[str, float], rows: int, grid: Grid) -> Numbers:
    """A client's vector: its changes in the order of their names, then its rows.

    Args:
        changes: name -> how far training moved the numbers.
        bounds: name -> the most that it can have.
        rows: n_u; above `grid.most` it counts for that.
        grid: as all have it.

    Raises:
        FloranaError: a number is beyond its bound, or not finite.

    Examples:
        >>> grid = Grid(bits=16, clients=2, most=4)
        >>> vector = encoded({"q": torch.tensor([1.0, -0.5])}, {"q": 1.0}, 4, grid)
        >>> means, total = decoded(vector, {"q": (2,)}, {"q": 1.0}, grid)
        >>> [round(x, 3) for x in means["q"].tolist()], total
        ([1.0, -0.5], 4)
    """
    own = min(rows, grid.most)
    parts = []
    for name in sorted(changes):
        change, bound = changes[name].double().flatten().cpu(), bounds[name]
        beyond = float(change.abs().max()) if change.numel() else 0.0
        if not beyond <= bound * (1 + 1e-9):
            raise FloranaError(
                f"'{name[:80]}' was changed by {beyond:.3g}, more than the {bound:.3g} that this recipe's training can",
                fix="look for values that are not finite, or for another optimizer than the recipe's",
            )
        if bound == 0:
            parts.append(np.zeros(change.numel(), dtype=np.int64))
            continue
        scale = own / (grid.clients * grid.most * grid.step(bound))
        parts.append(torch.round(change * scale).to(torch.int64).numpy())
    digits = [(own >> (place * grid.digit)) & ((1 << grid.digit) - 1) for place in range(grid.digits)]
    whole = np.concatenate([*parts, np.array(digits, dtype=np.int64)])
    return whole.astype(np.uint32) & low(grid.bits)  # modulo 2^32, then modulo 2^bits


def decoded(
    total: Numbers, shapes: Mapping[str, Sequence[int]], bounds: Mapping[str, float], grid: Grid
) -> tuple[dict[str, Tensor], int]:
    """The weighted means of the changes, float64, and the sum of the rows, from a sum of vectors modulo 2^bits.

    Args:
        total: the sum.
        shapes: name -> the shape of the change.
        bounds: as the clients had them.
        grid: as the clients had it.

    Raises:
        FederationError: the rows sum up to nothing, or to more than the clients can have: a vector was no honest one.
    """
    signed = total.astype(np.int64)
    signed = np.where(signed >= 1 << (grid.bits - 1), signed - (1 << grid.bits), signed)
    digits = total[len(total) - grid.digits :].astype(np.int64)
    rows = sum(int(value) << (place * grid.digit) for place, value in enumerate(digits))
    if not 1 <= rows <= grid.clients * grid.most:
        raise FederationError(
            f"the rows of {grid.clients} clients sum up to {rows}, and {grid.clients * grid.most} are the most",
            why="a client sent another vector than its own",
            fix="nobody can say which: ask the sites, and run again with --resume",
        )
    means, place = {}, 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        part = torch.from_numpy(signed[place : place + size].astype(np.float64)).reshape(tuple(shapes[name]))
        means[name] = part * (grid.step(bounds[name]) * grid.clients * grid.most / rows)
        place += size
    return means, rows
