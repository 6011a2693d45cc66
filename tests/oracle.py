"""Naive float64 answers written from the papers: dense, slow, obvious. Independent of florana's own code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Client:
    """One client's module: B (out, r), A (r, in), its scaling and its weight."""

    B: np.ndarray
    A: np.ndarray
    scaling: float
    weight: float


def shares(clients: list[Client]) -> np.ndarray:
    weights = np.array([client.weight for client in clients], dtype=np.float64)
    return weights / weights.sum()


def target(clients: list[Client]) -> np.ndarray:
    """sum_u w_u s_u B_u A_u, dense."""
    return sum(
        w * c.scaling * c.B.astype(np.float64) @ c.A.astype(np.float64)
        for w, c in zip(shares(clients), clients, strict=True)
    )


def fedit(clients: list[Client]) -> np.ndarray:
    """The dense update of averaged factors; the output scaling is the largest, as florana documents."""
    scaling = max(c.scaling for c in clients)
    B = sum(w * c.scaling / scaling * c.B.astype(np.float64) for w, c in zip(shares(clients), clients, strict=True))
    A = sum(w * c.A.astype(np.float64) for w, c in zip(shares(clients), clients, strict=True))
    return scaling * B @ A


def best_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Truncated dense SVD."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def mixed(
    clients: list[Client], p: np.ndarray, q: np.ndarray, base: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """The dense product of FLoRA-NA's mixed factors; base (B_0, A_0) as they enter, already at the output scaling."""
    scaling = max(c.scaling for c in clients)
    B_0, A_0 = base if base is not None else (np.zeros(clients[0].B.shape), np.zeros(clients[0].A.shape))
    B = B_0 + sum(p_u * (c.B.astype(np.float64) * c.scaling / scaling - B_0) for p_u, c in zip(p, clients, strict=True))
    A = A_0 + sum(q_u * (c.A.astype(np.float64) - A_0) for q_u, c in zip(q, clients, strict=True))
    return scaling * B @ A


def mixed_by_component(
    clients: list[Client], p: np.ndarray, q: np.ndarray, base: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """As `mixed`, with p and q (U, r): one coefficient per client and column of B, or row of A."""
    scaling = max(c.scaling for c in clients)
    B_0, A_0 = base if base is not None else (np.zeros(clients[0].B.shape), np.zeros(clients[0].A.shape))
    B = B_0 + sum((c.B.astype(np.float64) * c.scaling / scaling - B_0) * p_u for p_u, c in zip(p, clients, strict=True))
    A = A_0 + sum((c.A.astype(np.float64) - A_0) * q_u[:, None] for q_u, c in zip(q, clients, strict=True))
    return scaling * B @ A


def best_by_component(
    clients: list[Client], fixed: np.ndarray, side: str, base: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """The p (U, r) of least error for the given q, or the q for the given p, by dense least squares."""
    shape = fixed.shape

    def answer(free: np.ndarray) -> np.ndarray:
        pair = (free.reshape(shape), fixed) if side == "p" else (fixed, free.reshape(shape))
        return mixed_by_component(clients, *pair, base).ravel()

    nothing = answer(np.zeros(shape))
    columns = np.stack([answer(unit) - nothing for unit in np.eye(fixed.size)], axis=1)
    return np.linalg.lstsq(columns, target(clients).ravel() - nothing, rcond=1e-12)[0].reshape(shape)
