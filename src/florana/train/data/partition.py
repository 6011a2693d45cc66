"""Who holds what: the training rows dealt out by Flower Datasets' partitioners, then a local test split set apart."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from florana.errors import InputError
from florana.federation.sampling import derive
from florana.recipe import schema as r

SITE = "florana_site"
"""The column that says whose row it is, where each client has a file of its own."""


@dataclass(frozen=True)
class Share:
    """One client's rows, as indices into the training table: to train on, and its local test split."""

    train: tuple[int, ...]
    test: tuple[int, ...]


def deal(
    table: datasets.Dataset, settings: r.Partition, label: str | None, lengths: Sequence[int], seed: int
) -> dict[str, Share]:
    """Client name -> its rows; every row goes to exactly one client. The same arguments give the same shares.

    Args:
        table: the training rows.
        settings: the recipe's partition.
        label: the column of classes (or of `binned` scores), where there is one.
        lengths: the length of each row's text, for `kind = "length"`.
        seed: of everything random in the partition.

    Raises:
        InputError: too few rows for the clients wanted, or a column that cannot be split by.
    """
    if settings.kind == "sites":
        holders = list(table[SITE])
        owned = {client: [row for row, holder in enumerate(holders) if holder == client] for client in set(holders)}
        return {client: _share(owned[client], settings, client, seed) for client in sorted(owned)}
    from florana.train.data.partitioners import partitioner_of  # brings a library for plots; a site needs neither

    keys = datasets.Dataset.from_dict({"row": list(range(len(table)))})
    by = settings.by or label
    if settings.kind in ("dirichlet", "pathological", "column"):
        assert by is not None
        if by not in table.column_names:
            raise InputError(
                f"partition.by: there is no column '{by}'", fix=f"columns: {', '.join(table.column_names)}"
            )
        keys = keys.add_column("key", [str(value) for value in table[by]])
    if settings.kind == "length":
        assert settings.clients is not None
        order = np.argsort(np.asarray(lengths), kind="stable")
        bins = np.empty(len(order), dtype=np.int64)
        bins[order] = np.arange(len(order)) * settings.clients // len(order)
        keys = keys.add_column("key", [f"{value:06d}" for value in bins])
    keys = keys.shuffle(seed=derive(seed, "deal") % 2**32)  # some partitioners cut in the order they find
    partitioner = partitioner_of(settings, derive(seed, "partition") % 2**31)
    partitioner.dataset = keys
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():  # a bar over a loop of milliseconds
            warnings.simplefilter("ignore", UserWarning)  # of its own retries; what it ends with is checked below
            count = partitioner.num_partitions
            rows = [[int(row) for row in partitioner.load_partition(index)["row"]] for index in range(count)]
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"the {len(table)} rows could not be dealt out to {settings.clients} clients by '{settings.kind}'",
            why=str(error).splitlines()[0],
            fix="fewer clients, a larger partition.alpha, or a smaller partition.smallest",
        ) from None
    width = len(str(max(count - 1, 1)))
    return {
        f"client-{index:0{width}d}": _share(own, settings, f"client-{index:0{width}d}", seed)
        for index, own in enumerate(rows)
    }


def binned(scores: Sequence[float], bins: int) -> tuple[list[int], tuple[str, ...]]:
    """The bin of each score, and the bins' names: `bins` of equal width from the least score to the greatest.

        bin = min(floor(bins (y - least) / (greatest - least)), bins - 1)

    Splits by label (Dirichlet, pathological) take these for classes, as a score has none; of STS-B's 0 to 5, five bins
    are the whole numbers. All scores alike: one bin.

    Examples:
        >>> binned([0.0, 0.9, 1.0, 4.9, 5.0], bins=5)[0]
        [0, 0, 1, 4, 4]
    """
    least, width = min(scores), (max(scores) - min(scores)) / bins
    if width == 0:
        return [0] * len(scores), (f"{least:g}",)
    names = tuple(f"{least + index * width:.3g} to {least + (index + 1) * width:.3g}" for index in range(bins))
    return [min(int((score - least) / width), bins - 1) for score in scores], names


def table_of(shares: Mapping[str, Share], classes: Sequence[int] | None, labels: Sequence[str]) -> dict[str, object]:
    """Who holds what, as the report draws it: rows per client, and per class where the task has classes."""
    result: dict[str, object] = {"labels": list(labels), "clients": {}}
    for client, share in shares.items():
        entry: dict[str, object] = {"train": len(share.train), "test": len(share.test)}
        if classes is not None:
            counts = np.bincount([classes[row] for row in share.train], minlength=len(labels))
            entry["per_label"] = [int(count) for count in counts]
        result["clients"][client] = entry  # type: ignore[index]
    return result


def _share(rows: list[int], settings: r.Partition, client: str, seed: int) -> Share:
    if len(rows) < max(settings.smallest, 1):
        raise InputError(
            f"client '{client}' gets {len(rows)} rows, fewer than partition.smallest = {settings.smallest}",
            fix="fewer clients, more rows, a larger partition.alpha, or a smaller partition.smallest",
        )
    own_test = min(round(settings.holdout * len(rows)), len(rows) - 1)
    order = np.random.default_rng(derive(seed, "holdout", client)).permutation(sorted(rows))
    return Share(
        train=tuple(sorted(int(row) for row in order[own_test:])),
        test=tuple(sorted(int(row) for row in order[:own_test])),
    )
