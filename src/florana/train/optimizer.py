"""A client's optimizer and its learning rate, as the recipe's [train] has them: torch's and Transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import get_scheduler
from transformers.optimization import Adafactor

from florana.errors import RecipeError
from florana.federation.step_bounds import Reach, clipped_sgd, reach_of
from florana.recipe.train_schema import Train


def optimizer_of(
    settings: Train, parameters: Sequence[torch.nn.Parameter], second: Collection[torch.Tensor]
) -> torch.optim.Optimizer:
    """A fresh optimizer: its moments belong to parameters that the server has since replaced.

    Args:
        settings: the recipe's section.
        parameters: what is trained.
        second: those of them that are factors B: LoRA+ gives them a learning rate of their own.

    Raises:
        RecipeError: bitsandbytes, which 8-bit moments need, is not installed.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    groups: Any = list(parameters)
    if settings.loraplus_lr_ratio is not None:
        apart = {id(parameter) for parameter in second}
        groups = [
            {"params": [p for p in parameters if id(p) not in apart]},
            {"params": [p for p in parameters if id(p) in apart], "lr": rate * settings.loraplus_lr_ratio},
        ]
        groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        momentum = 0.9 if settings.momentum is None else settings.momentum
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, weight_decay=decay, foreach=True)
    if settings.optimizer == "adafactor":
        relaxed: torch.optim.Optimizer = Adafactor(
            groups, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False
        )
        return relaxed
    if settings.optimizer == "adamw-8bit":
        return _eight_bit()(groups, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, foreach=True)


def require_optimizer(settings: Train, device: torch.device) -> None:
    """Raise RecipeError, before anything is trained, where the optimizer is not to be had here.

    Args:
        settings: the recipe's section.
        device: of the model.
    """
    if settings.optimizer == "adamw-8bit":
        _eight_bit()
        if device.type != "cuda":
            raise RecipeError(
                "train.optimizer is 'adamw-8bit', and the model is not on a CUDA device",
                fix="use model.device = 'cuda', or train.optimizer = 'adamw'",
            )


def curve(settings: Train, steps: int, round_: int, rounds: int) -> Callable[[int], float]:
    """By what the learning rate is multiplied, for each step (from 0) of a round.

    Args:
        settings: the recipe's section.
        steps: of this client in one round.
        round_: the round's number, from 1.
        rounds: of the whole run.

    Examples:
        >>> half = curve(Train(steps=4, lr_schedule="linear"), 4, 2, 2)
        >>> [half(step) for step in range(4)]
        [0.5, 0.375, 0.25, 0.125]
    """
    if is_constant(settings):
        return lambda step: 1.0
    whole = settings.lr_schedule_over == "run"
    total, done = (rounds * steps, (round_ - 1) * steps) if whole else (steps, 0)
    name = "constant_with_warmup" if settings.lr_schedule == "constant" else settings.lr_schedule
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = round(settings.warmup_ratio * total)
    scheduler = get_scheduler(name, stand_in, num_warmup_steps=warmup, num_training_steps=total)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    # Transformers' first step has a rate of 0 where there is a warm-up, and one step a round would train nothing
    return lambda step: float(factor(done + step + 1 if done + step < warmup else done + step))


def is_constant(settings: Train) -> bool:
    """Whether the learning rate is the same in every step."""
    return settings.lr_schedule == "constant" and settings.warmup_ratio == 0


def reach(settings: Train, steps: int) -> Reach | None:
    """How far that many steps can move a number, where the optimizer bounds it; None where it does not.

    Of AdamW always, of SGD where gradients are clipped and nothing decays; a schedule only lowers the rate. Adafactor
    bounds a tensor's mean square, and 8-bit moments are not those of the bound.

    Args:
        settings: the recipe's section.
        steps: of the client in one round.
    """
    rates = (settings.learning_rate, settings.learning_rate * (settings.loraplus_lr_ratio or 1.0))
    if settings.optimizer == "adamw":
        own, second = (reach_of(rate, settings.weight_decay, steps) for rate in rates)
    elif settings.optimizer == "sgd" and settings.max_grad_norm is not None and settings.weight_decay == 0:
        momentum = 0.9 if settings.momentum is None else settings.momentum
        own, second = (clipped_sgd(rate, momentum, settings.max_grad_norm, steps) for rate in rates)
    else:
        return None
    return Reach(own.moves, own.decay, (second.moves, second.decay))


def _eight_bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        import bitsandbytes
    except ImportError:
        raise RecipeError(
            "train.optimizer = 'adamw-8bit' needs bitsandbytes, which is not installed",
            fix="pip install bitsandbytes, or use train.optimizer = 'adamw'",
        ) from None
    found: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit
    return found
