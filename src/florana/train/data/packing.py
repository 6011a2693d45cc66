"""Short rows of text laid end to end, so that a batch holds few padding tokens; no row sees another.

Best-fit decreasing: the longest row first, each into the fullest bin that has room. Which rows share a bin depends on
their lengths alone. Position numbers begin anew at each row: Transformers closes the attention between rows by them.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from florana.train.data.tokenize import Example


def packed(rows: Sequence[Example], length: int) -> list[Example]:
    """The rows in as few bins as best-fit decreasing makes of them.

    Args:
        rows: of language modelling; each has labels for its own tokens, none for its first.
        length: tokens of a bin; a longer row has one to itself.

    Returns:
        One example per bin, in the order of its first row; its rows in their order.

    Examples:
        >>> rows = [Example((1,) * n, (), (-100,) * n) for n in (2, 5, 3)]
        >>> [one.starts for one in packed(rows, 6)]
        [(0, 2), (0,)]
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(rows)), key=lambda row: (-len(rows[row].ids), row)):
        size = len(rows[index].ids)
        place = bisect.bisect_left(free, (size, 0))
        if place == len(free):
            bins.append([index])
            room, number = length - size, len(bins) - 1
        else:
            room, number = free.pop(place)
            bins[number].append(index)
            room -= size
        bisect.insort(free, (max(room, 0), number))
    return [_joined([rows[index] for index in sorted(one)]) for one in sorted(bins, key=min)]


def _joined(rows: Sequence[Example]) -> Example:
    starts = [0]
    for row in rows[:-1]:
        starts.append(starts[-1] + len(row.ids))
    return Example(
        ids=tuple(token for row in rows for token in row.ids),
        kinds=tuple(kind for row in rows for kind in row.kinds),
        labels=tuple(int(label) for row in rows for label in row.labels),
        starts=tuple(starts),
    )
