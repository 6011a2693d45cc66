"""Flower Datasets' partitioners, as the recipe names them."""

from __future__ import annotations

from flwr_datasets.partitioner import (
    DirichletPartitioner,
    ExponentialPartitioner,
    IidPartitioner,
    LinearPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
    SquarePartitioner,
)

from florana.recipe import schema as r


def partitioner_of(settings: r.Partition, seed: int) -> Partitioner:
    """The partitioner of a table whose column "key" says what is split by.

    Args:
        settings: the recipe's partition; any kind but `sites`.
        seed: of everything random in it.
    """
    clients = settings.clients or 1
    match settings.kind:
        case "iid":
            return IidPartitioner(num_partitions=clients)
        case "dirichlet":
            return DirichletPartitioner(
                num_partitions=clients,
                partition_by="key",
                alpha=settings.alpha,
                min_partition_size=settings.smallest,
                self_balancing=False,
                shuffle=True,
                seed=seed,
            )
        case "pathological":
            return PathologicalPartitioner(
                num_partitions=clients,
                partition_by="key",
                num_classes_per_partition=settings.classes,
                class_assignment_mode="deterministic",
                shuffle=True,
                seed=seed,
            )
        case "column" | "length":
            return NaturalIdPartitioner(partition_by="key")
        case "linear":
            return LinearPartitioner(num_partitions=clients)
        case "square":
            return SquarePartitioner(num_partitions=clients)
        case "exponential":
            return ExponentialPartitioner(num_partitions=clients)
