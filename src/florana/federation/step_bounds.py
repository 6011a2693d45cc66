"""How far training can have moved a number at all: what a recipe's own optimizer allows, and no honest client exceeds.

AdamW begins every round with moments of zero, so its t-th step moves a number by lr times

    |m_t| / sqrt(v_t) = |sum_i a_i g_i| / sqrt(sum_i b_i g_i^2)  <=  sqrt(sum_i a_i^2 / b_i) = c_t      (Cauchy-Schwarz)

whatever the gradients g were, with a_i = (1 - beta_1) beta_1^(t-i) / (1 - beta_1^t), b_i the same of beta_2 (Kingma
and Ba, arXiv 1412.6980), so that

    c_t^2 = ((1 - beta_1) / (1 - beta_1^t))^2  (1 - beta_2^t) / (1 - beta_2)  sum_{j<t} (beta_1^2 / beta_2)^j

Decay (arXiv 1711.05101) multiplies by 1 - lr wd in every step. After T steps, from w_0:

    |w_T - w_0| <= lr sum_{t<=T} c_t + (1 - (1 - lr wd)^T) |w_0|

c_1 = 1, c_8 = 1.03, c_100 = 2.2, c_t < 7.3. This needs no other client to compare with: it holds for one,
for two, and for any number that lie together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from florana.lora.factors import kind_of

BETAS = (0.9, 0.999)
"""Those of torch's AdamW, with which clients train."""

EARLY = 100_000
"""After so many steps c_t has come to its limit, to the last bit."""

SLACK = 1.05
"""For float32 and for quantized uplinks: two roundings of an int8 block are one part in 127."""


@dataclass(frozen=True)
class Reach:
    """What one round of training can do: |w_T - w_0| <= moves + decay |w_0|.

    Args:
        moves: in the numbers' own unit.
        decay: of their size.
        second: moves and decay of factors B, where they have a learning rate of their own (LoRA+).
    """

    moves: float
    decay: float
    second: tuple[float, float] | None = None

    def of(self, name: str, before: Tensor, trains: Collection[str]) -> Tensor:
        """The most that each number of a tensor (named as in `Adapter.tensors`) can have changed, float64.

        A core that is sent with a trained factor s multiplied in (`scale` in `trains`), s_0 = 1, allows
        |s H - H_0| <= (1 + R_s) R_H + R_s |H_0|.

        Args:
            name: the tensor's name, as in `Adapter.tensors`.
            before: its values as they were sent.
            trains: the kinds of tensors that the client trains.
        """
        size = before.double().abs()
        moves, decay = self.second if self.second is not None and kind_of(name) == "B" else (self.moves, self.decay)
        own = moves + decay * size
        if kind_of(name) == "core" and "scale" in trains:
            scale = self.moves + self.decay
            own = (1 + scale) * own + scale * size
        return SLACK * own + 1e-6 * size


def allowed(reach: Reach, before: Mapping[str, Tensor], trains: Collection[str]) -> Callable[[str], Tensor]:
    """The name of a tensor -> the most that each of its numbers can have changed; nothing, of what is not trained.

    Args:
        reach: of the round's training.
        before: the tensors as they were sent, named as in `Adapter.tensors`.
        trains: the kinds of tensors that the client trains.

    Examples:
        >>> import torch
        >>> may = allowed(reach_of(0.01, 0.0, 1), {"A/q": torch.ones(1), "B/q": torch.ones(1)}, {"B"})
        >>> may("A/q").tolist(), round(float(may("B/q")), 4)
        ([0.0], 0.0105)
    """

    def of(name: str) -> Tensor:
        if kind_of(name) != "extra" and kind_of(name) not in trains:
            return torch.zeros_like(before[name], dtype=torch.float64)
        return reach.of(name, before[name], trains)

    return of


def reach_of(learning_rate: float, weight_decay: float, steps: int) -> Reach:
    """The reach of that many steps of AdamW.

    Examples:
        >>> reach_of(0.01, 0.0, 1).moves
        0.01
    """
    kept = max(0.0, 1.0 - learning_rate * weight_decay)
    return Reach(learning_rate * _steps_together(steps), 1.0 - kept**steps)


def clipped_sgd(learning_rate: float, momentum: float, norm: float, steps: int) -> Reach:
    """The reach of that many steps of SGD whose gradients are clipped to a norm.

    |v_t| <= norm (1 - m^t) / (1 - m), so

        |w_T - w_0| <= lr sum_{t<=T} |v_t| <= lr norm (T - m (1 - m^T) / (1 - m)) / (1 - m)

    Args:
        learning_rate: lr.
        momentum: m, of the velocity v; below 1.
        norm: the most that a gradient is long.
        steps: T.

    Examples:
        >>> clipped_sgd(0.1, 0.0, 1.0, 3).moves.__round__(3), clipped_sgd(1.0, 0.5, 1.0, 2).moves
        (0.3, 2.5)
    """
    rest = 1.0 - momentum
    return Reach(learning_rate * norm * (steps - momentum * (1.0 - momentum**steps) / rest) / rest, 0.0)


@functools.lru_cache(maxsize=64)
def _steps_together(steps: int) -> float:
    """sum_{t <= T} c_t. Steps follow from the rows that a site claims: for late ones the limit of c_t stands."""
    early = min(steps, EARLY)
    return math.fsum(_largest_step(t) for t in range(1, early + 1)) + (steps - early) * _largest_step(EARLY * 10)


def _largest_step(t: int) -> float:
    """c_t."""
    first, second = BETAS
    ratio = first * first / second
    weights = ((1 - first) / (1 - first**t)) ** 2 * (1 - second**t) / (1 - second)
    return math.sqrt(weights * (1 - ratio**t) / (1 - ratio))
