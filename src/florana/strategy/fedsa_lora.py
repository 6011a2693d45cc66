"""FedSA-LoRA: A shared and averaged, B trained and kept by its client (Guo et al., arXiv 2410.01463, ICLR 2025).

    A = sum_u w_u A_u;   the model of client u is W + s B_u A

A method for personal models: there is no global B, so no global product, no global score and no aggregation error. A
client that loses its B begins again at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from florana.aggregate.mean import mean
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, sending, start, work

FACTS = facts.Facts(
    does="averages A; every client keeps its own B",
    trains="A, B",
    up=facts.ONLY_A,
    down=facts.ONLY_A,
    exact="no global product",
    absent="the current A; its own B is as old as its last round",
    client_state="B_u; lost, it begins at zero again",
    mixed_ranks="refused: rows of A are averaged one by one",
    secure_aggregation="yes: sums of A",
    noise="in A alone; B never leaves",
    one_model=False,
    differs="heads are averaged unless `model.head = 'personal'`; the official configuration keeps them local",
)
WORK = work(trains=["A", "B"], up=["A"], down=["A"])


def build() -> Strategy:
    """The strategy; it has no options."""
    return Strategy("fedsa-lora", "arXiv 2410.01463", FACTS, start, sending(WORK), _step)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    averaged = mean(parts)
    modules = {
        name: LoraFactors(B=pair.B, A=averaged.modules[name].A, scaling=pair.scaling)
        for name, pair in state.adapter.modules.items()
    }
    return Outcome(advance(state, Adapter(modules, averaged.extra)))
