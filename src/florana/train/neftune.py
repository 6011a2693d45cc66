"""Noise on the embeddings while a client trains (NEFTune, arXiv 2310.05914)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from florana.recipe import schema as r
from florana.train.model import Workbench


@contextmanager
def noisy_embeddings(bench: Workbench, settings: r.Train) -> Iterator[None]:
    """NEFTune's noise on the embeddings, by Transformers' own hook, while the rows of a round go through."""
    if settings.neftune_noise_alpha is None:
        yield
        return
    handle = activate_neftune(bench.model, settings.neftune_noise_alpha)
    try:
        yield
    finally:
        deactivate_neftune(bench.model, handle)
