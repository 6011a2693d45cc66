"""HetLoRA at a client: the term that makes what lies beyond the lower rank small, and whether training did."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from florana.aggregate.heterogeneous import tail
from florana.lora.factors import Adapter, LoraFactors
from florana.strategy.base import Pruning


def penalty_of(modules: Mapping[str, LoraFactors], pruning: Pruning) -> Callable[[], Tensor]:
    """penalty * tail of these very parameters, computed anew at every call: HetLoRA's term in the clients' loss."""
    return lambda: pruning.penalty * tail(modules, pruning.rank)


def shrunk(before: Adapter, after: Adapter, pruning: Pruning) -> bool:
    """Whether training made what lies beyond the lower rank smaller: the client then prunes it."""
    return bool(tail(after.modules, pruning.rank) < tail(before.modules, pruning.rank))
