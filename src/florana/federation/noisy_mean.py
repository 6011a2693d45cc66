"""The mean of what clients measured, with noise: no client moves it by more than its clip, and noise covers that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from florana.dp.noise import Draws
from florana.lora.factors import Update
from florana.strategy.base import Named, Payload, Sums


def noisy_mean(
    updates: Sequence[Update],
    asking: tuple[Sums, int, int, Named],
    payloads: Mapping[str, Payload],
    clip: float,
    multiplier: float,
    draws: Draws,
) -> dict[str, Tensor]:
    """mean_u m_u(untrained) + ( sum_u d_u min(1, C / || d_u ||) + sigma C z ) / n

    with d_u what the client sent less what it would have sent untrained, all its tensors one vector, z standard normal,
    and n the number of clients that were *asked*: one that is away counts as one without a change, so that nothing but
    the sum depends on it. Directions and bases are orthonormal, so a client that has cut the change of its product to C
    is not cut again.

    Args:
        updates: what clients measured.
        asking: the strategy's sums, the trip, the round, and the question.
        payloads: client -> what it was sent, of all that were asked.
        clip: C.
        multiplier: sigma.
        draws: where z comes from.
    """
    sums, trip, round_, question = asking
    known: dict[tuple[int, int], Named] = {}

    def untrained(sent: Payload) -> Named:
        key = (id(sent.adapter), id(sent.question) if sent.question else 0)
        if key not in known:
            told = question if trip else sent.question
            known[key] = sums.measure(trip, round_, told, sent.adapter, sent.adapter)
        return known[key]

    start: dict[str, Tensor] = {}
    for sent in payloads.values():
        for name, tensor in untrained(sent).items():
            start[name] = start.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    total = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for update in updates:
        before = untrained(payloads[update.client])
        change = {name: tensor.double() - before[name].double() for name, tensor in update.measured.items()}
        size = math.hypot(*(float(tensor.norm()) for tensor in change.values()))
        for name, tensor in change.items():
            total[name] += min(1.0, clip / max(size, 1e-300)) * tensor
    asked, like = len(payloads), untrained(next(iter(payloads.values())))
    found = {}
    for name in sorted(total):
        noise = multiplier * clip * draws.normal(*total[name].shape)
        found[name] = ((start[name] + total[name] + noise) / asked).to(like[name].dtype)
    return found
