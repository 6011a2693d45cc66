"""FedRot-LoRA: clients' factors turned to the last broadcast before averaging (arXiv 2602.23638, ICML 2026).

Trains A and B; r (out + in) parameters up and down per module, as FedIT; the base stays; U small SVDs of r x r at the
server, which must see every client's factors. As published (`align = "in-turn"`): the first round is FedIT's, from the
second on A alone and B alone are aligned in turn, by rotations softened to `strength`. `align = "joint"` aligns both
at once, from the first round, by any orthogonal matrix: a variant of florana's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from florana.aggregate.mean import mean
from florana.aggregate.rotate import by_A, by_B, rotated_mean
from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution
from florana.strategy import facts
from florana.strategy.base import MARK, Outcome, State, Strategy, advance, broadcast

FACTS = facts.Facts(
    does="turns each client's factors to the last broadcast, by A and by B in turn (or by both, option `align`), then "
    "averages",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="inexact: what rotation explains of `fedit`'s error goes away",
    optimizer=("factors", "products"),
)
_IN_TURN = MARK + "in-turn"
"""In the memory of every state that `_init` began. One without it, at a later round, is of a run that was begun when
both factors were aligned at once from the first round; it goes on so."""


def build(align: Literal["in-turn", "joint"] = "in-turn", strength: float | None = None) -> Strategy:
    """The strategy.

    Args:
        align: A and B in turn from the second round, as published, or both at once from the first.
        strength: lambda of `in-turn`, from 0 (FedIT) to 1 (the whole rotation); 0.5 where not given. The paper has 0.4
            to 0.6 as best.
    """
    if align == "joint" and strength is not None:
        raise RecipeError("strategy.strength does not go with strategy.align = 'joint'", fix="leave it out")
    if strength is not None and not 0 <= strength <= 1:
        raise RecipeError(f"strategy.strength is {strength}, not at least 0 and at most 1")
    step = _joint if align == "joint" else _InTurn(0.5 if strength is None else strength)
    return Strategy("fedrot", "arXiv 2602.23638", FACTS, _init, broadcast, step)


def _init(adapter: Adapter) -> State:
    return State(0, adapter, memory={_IN_TURN: torch.ones(())})


def _joint(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, rotated_mean(parts, state.adapter)))


@dataclass(frozen=True)
class _InTurn:
    strength: float

    def __call__(self, state: State, parts: Sequence[Contribution]) -> Outcome:
        if state.round == 0:
            return Outcome(advance(state, mean(parts)))
        if _IN_TURN not in state.memory:
            return _joint(state, parts)
        turn = by_A if state.round % 2 == 1 else by_B  # A in the second round, B in the third
        return Outcome(advance(state, rotated_mean(parts, state.adapter, turn(self.strength))))
