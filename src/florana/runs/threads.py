"""How many threads the arithmetic takes: a part of what a run is.

A long sum is split over the threads, so its last bits depend on how many there are, and so do the bytes of an adapter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VARIABLES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "OMP_DYNAMIC", "OMP_THREAD_LIMIT")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch and the libraries below it take `count` threads; None: as many as they would. Then as before.

    Also what stays the same is set: a number that nobody has set lets MKL take fewer where it sees fit.

    Examples:
        >>> with threads(3):
        ...     torch.get_num_threads()
        3
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def instructions() -> str:
    """The processor's instructions that torch's own kernels use, like AVX2: their sums differ in the last bits too.

    With those variables of the environment that choose others for the libraries below torch, or fewer threads.
    """
    chosen = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *chosen])[:200]
