"""Two rules that part direction from length: FedIT's mean made as long as the exact average, and the reverse.

    python benchmarks/distance.py docstrings --seeds 5 --vary "" --rounds 1,2,5 --score \
        --rules benchmarks/lengths.py:long_mean,benchmarks/lengths.py:short_best

Averaging factors apart shortens what clients disagree about, so FedIT's step differs from the exact one in length too.
If a merge's score follows its length, `long_mean` scores like `best-rank`, and `short_best` like `fedit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from florana import Adapter, Contribution, best_rank, mean
from florana.aggregate.best_rank.project import targets
from florana.lora import linalg


def long_mean(parts: Sequence[Contribution], rank: int) -> Adapter:
    """FedIT's pair of each module, times ||target|| / ||s B A||."""
    del rank
    return stretched(mean(parts), {name: linalg.norm(target) for name, (target, _, _) in targets(parts).items()})


def short_best(parts: Sequence[Contribution], rank: int) -> Adapter:
    """The best pair of each module, made as long as FedIT's."""
    return stretched(best_rank(parts, rank), lengths(mean(parts)))


def lengths(adapter: Adapter) -> dict[str, float]:
    return {name: linalg.norm(linalg.stack([pair], [1.0])) for name, pair in adapter.modules.items()}


def stretched(adapter: Adapter, wanted: dict[str, float]) -> Adapter:
    """The adapter with every module's product scaled to the wanted norm; a module of norm zero stays."""
    own = lengths(adapter)
    factors = {name: wanted[name] / own[name] if own[name] > 0 else 1.0 for name in own}
    modules = {name: replace(pair, B=pair.B * factors[name]) for name, pair in adapter.modules.items()}
    return replace(adapter, modules=modules)
