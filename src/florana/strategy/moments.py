"""One step of torch's own optimizers from the last tensors towards their average, its moments in and out.

    gradient = last - mean;    SGD with momentum (FedAvgM), Nesterov, Adam with bias correction (FedAdam), or plain SGD

Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295. The optimizers are torch.optim's; this hands them a
gradient and keeps what they keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Optimizer = Literal["none", "momentum", "nesterov", "adam", "extrapolate"]


@dataclass(frozen=True)
class ServerStep:
    """The optimizer's numbers.

    Args:
        optimizer: which formula.
        learning_rate: eta, above 0.
        beta: of the velocity; of Adam's first moment. At least 0, below 1.
        beta2: of Adam's second moment.
        epsilon: what is added to its root.
        velocity_rank: the most components per module in which a velocity is kept; None: twice the adapter's rank.
    """

    optimizer: Optimizer
    learning_rate: float
    beta: float
    beta2: float
    epsilon: float
    velocity_rank: int | None


def stepped(
    last: Mapping[str, Tensor],
    mean: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    settings: ServerStep,
    eta: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of torch's own optimizer from `last`, with last - mean for the gradient; (the tensors, its moments)."""
    moved: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name in mean:
        parameter = torch.nn.Parameter(last[name].detach().clone())
        parameter.grad = last[name] - mean[name].to(last[name].dtype)
        optimizer = _torch_optimizer(parameter, settings, eta)
        names = _moments(settings)
        if names and f"{names[0]}/{name}" in own:
            optimizer.state[parameter] = {moment: own[f"{moment}/{name}"].clone() for moment in names}
        optimizer.step()
        moved[name] = parameter.detach()
        kept |= {f"{moment}/{name}": optimizer.state[parameter][moment] for moment in names}
    return moved, kept


def _torch_optimizer(parameter: torch.nn.Parameter, settings: ServerStep, eta: float) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        betas = (settings.beta, settings.beta2)
        return torch.optim.Adam([parameter], lr=eta, betas=betas, eps=settings.epsilon)
    if settings.optimizer == "extrapolate":
        return torch.optim.SGD([parameter], lr=eta)
    nesterov = settings.optimizer == "nesterov" and settings.beta > 0
    return torch.optim.SGD([parameter], lr=eta, momentum=settings.beta, nesterov=nesterov)


def _moments(settings: ServerStep) -> tuple[str, ...]:
    """What torch's optimizer keeps between steps."""
    if settings.optimizer == "adam":
        return ("step", "exp_avg", "exp_avg_sq")
    moving = settings.optimizer in ("momentum", "nesterov") and settings.beta > 0
    return ("momentum_buffer",) if moving else ()
