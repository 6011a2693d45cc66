"""FLoRA-NA's coefficients by gradient descent, the published style, kept for comparison with `als`.

Public code of this family fits one multiplier per client and side, started at 1 (so p = q = w), by AdamW with
learning rate 1e-2 for 200 steps, cosine decay to 1e-4 over the first three quarters, weight decay 0.01, and keeps the
best iterate. Here the loss is the relative squared Frobenius error of Equation 6, from the same r x r blocks as `als`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from florana.aggregate.flora_na.gram import Coefficients, quadratic, target_square
from florana.aggregate.flora_na.matrix_free import Products

FINAL_RATE = 1e-4


def solve(
    modules: Sequence[Products],
    *,
    steps: int = 200,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.01,
) -> Coefficients:
    """Coefficients for the modules that share them; the best iterate is kept, so never worse than FedIT.

    Args:
        modules: one entry per module; the same clients and weights in each. Two hundred steps pay for the blocks.
        steps: how many AdamW steps.
        learning_rate: AdamW's learning rate at the start.
        weight_decay: AdamW's, on the multipliers.
    """
    blocks = [module.blocks() for module in modules]
    weights = blocks[0].weights
    one = torch.ones(1, dtype=weights.dtype, device=weights.device)
    target = sum(
        (block.unit * target_square(block) for block in blocks),
        torch.zeros((), dtype=weights.dtype, device=weights.device),
    )
    multipliers = torch.ones((2, len(weights)), dtype=weights.dtype, device=weights.device, requires_grad=True)
    optimizer = torch.optim.AdamW([multipliers], lr=learning_rate, weight_decay=weight_decay)
    best, best_multipliers = math.inf, multipliers.detach().clone()
    history: list[float] = []
    for step in range(steps + 1):
        p = torch.cat([one, weights * multipliers[0]])
        q = torch.cat([one, weights * multipliers[1]])
        error = target.clone()
        for block in blocks:
            M, b = quadratic(block.G, block.H, block.weights, q)
            error = error + block.unit * (p @ M @ p - 2 * p @ b)
        value = max(float(error.detach()), 0.0)
        if value < best:
            best, best_multipliers = value, multipliers.detach().clone()
        history.append(best)
        if step == steps or float(target) == 0:
            break
        progress = min(1.0, step / (0.75 * steps))
        rate = FINAL_RATE + (learning_rate - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (error / target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Coefficients(weights * best_multipliers[0], weights * best_multipliers[1], tuple(history))
