"""A few tokens through a model as it was loaded, before any row: whether it trains, and what padding does to it.

Families differ in ways that no table keeps up with: what they refuse, where they read a row's answer, whether they
leave padding out. So the model is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from florana.errors import InputError
from florana.train.data.packing import packed
from florana.train.data.tokenize import Example, collate, encode_classes, encode_language

TEXTS = (("a film",), ("a good film and a quick story, b c d e f g",))
TOKENS = 12
"""The most that a text of the probe has."""
NEAR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""By the base's dtype, how far two readings of one row may lie apart, relative to the largest output."""


class Probed(Protocol):
    """What is asked of a model with its tokenizer: a `Workbench` that is being built has it all, and `Finished`."""

    model: Any
    tokenizer: Any
    device: torch.device

    padding: str | None

    def batch(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Rows as one batch, padded as the model wants it."""

    def accepted(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a batch, the inputs that the model knows."""

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """The model's answer."""


def probe(bench: Probed, task: str, base: str) -> str | None:
    """The side on which rows are padded: the tokenizer's, if a padded row is then read as it is alone, else the other.

    None where a padded row is another row to the model (FNet mixes all positions): rows are then measured in batches
    of one length.

    Raises:
        InputError: the model fails on two short texts, or sees the tokens that a causal-lm is to predict.
    """
    rows = rows_of_probe(bench, task)
    devices = [bench.device] if bench.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            _train(bench, rows)
            bench.model.eval()
            if task == "causal-lm" and not _is_causal(bench, rows[1]):
                raise InputError(
                    f"the model '{base}' sees the tokens that task = 'causal-lm' has it predict",
                    why="it reads texts in both directions, as encoders do",
                    fix="take a decoder, or one whose config.json says is_decoder = true",
                )
            return padding_side(bench, task)
    except InputError:
        raise
    except Exception as error:  # models raise what they like
        raise InputError(
            f"the model '{base}' fails on two short texts",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix=f"it cannot be trained as task = '{task}': take another model",
        ) from None


def padding_side(bench: Probed, task: str) -> str | None:
    """The side on which a padded row is read as it is alone; None where there is none. The model is not trained."""
    bench.model.eval()
    rows = rows_of_probe(bench, task)
    usual = "right" if task == "causal-lm" else str(bench.tokenizer.padding_side)
    other = "left" if usual == "right" else "right"
    alone = _logits(bench, rows[:1], usual)
    sides = [usual] if task == "causal-lm" else [usual, other]
    return next((side for side in sides if _near(alone, _first(_logits(bench, rows, side), rows, side))), None)


@torch.inference_mode()
def pads_left(bench: Probed) -> bool:
    """Whether a prompt may be padded on the left, as a batch that writes is: recurrent models may read the padding."""
    bench.model.eval()
    rows = rows_of_probe(bench, "causal-lm")
    batch = collate(rows, bench.tokenizer.pad_token_id, bench.device, "left")
    places = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)  # as `generate` counts them
    logits = bench.forward({**batch, "position_ids": places}).logits
    return _near(_logits(bench, rows[:1], "left")[0, -1], logits[0, -1])


@torch.inference_mode()
def require_apart(bench: Probed, base: str) -> None:
    """Raise InputError where rows that are laid end to end (`train.packing`) are not read as they are alone."""
    bench.model.eval()
    rows = rows_of_probe(bench, "causal-lm")
    batch = collate(packed(rows, 2 * TOKENS), bench.tokenizer.pad_token_id, bench.device)
    alone = torch.cat([_logits(bench, [row], "right")[0] for row in rows])
    try:
        apart = _near(bench.forward(batch).logits[0], alone)
    except Exception:  # models raise what they like
        apart = False
    if not apart:
        raise InputError(
            f"train.packing does not go with the model '{base}'",
            why="rows laid end to end would see one another: it does not tell them apart by their position numbers",
            fix="set train.packing = false",
        )


def rows_of_probe(bench: Probed, task: str) -> list[Example]:
    """Two short rows of unlike lengths, as the model reads them, with labels of the task."""
    if task == "causal-lm":
        return encode_language(TEXTS, bench.tokenizer, TOKENS)
    return encode_classes(TEXTS, [0.0, 0.0] if task == "sequence-regression" else [0, 0], bench.tokenizer, TOKENS)


def _train(bench: Probed, rows: list[Example]) -> None:
    """One step's way there and back, without the step. Raises InputError where something else than LoRA moves."""
    bench.model.train()
    before = {name: buffer.clone() for name, buffer in bench.model.named_buffers()}
    bench.forward(bench.batch(rows)).loss.backward()
    bench.model.zero_grad(set_to_none=True)
    moved = [name for name, buffer in bench.model.named_buffers() if not _same(buffer, before.get(name))]
    if moved:
        raise InputError(
            f"training changes what is no part of an adapter: {', '.join(sorted(moved)[:4])}",
            why="running statistics of the base model move with every row",
            fix="take another model",
        )


def _is_causal(bench: Probed, row: Example) -> bool:
    """Whether all outputs before the last are the same when the last token is another."""
    other = next(token for token in (*row.ids, 1, 0) if token != row.ids[-1])
    changed = replace(row, ids=(*row.ids[:-1], other))
    return _near(_logits(bench, [row], "right")[0, :-1], _logits(bench, [changed], "right")[0, :-1])


@torch.inference_mode()
def _logits(bench: Probed, rows: list[Example], side: str) -> Tensor:
    batch = collate(rows, bench.tokenizer.pad_token_id, bench.device, side)
    del batch["labels"]
    logits = bench.forward(batch).logits
    assert isinstance(logits, Tensor)
    return logits


def _first(logits: Tensor, rows: list[Example], side: str) -> Tensor:
    """The outputs of the first row without those of its padding."""
    return logits[:1] if logits.ndim == 2 else logits[:1, : len(rows[0].ids)]


def _near(one: Tensor, other: Tensor) -> bool:
    tolerance = NEAR.get(one.dtype, NEAR[torch.float32])
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * one.abs().max())


def _same(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(buffer, before)
