"""The two tasks as tokens: texts to token ids and labels, and a batch of them to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from florana.errors import InputError

IGNORED = -100
"""The label of a position that counts in no loss."""


@dataclass(frozen=True)
class Example:
    """One row as tokens. `labels` has one class index, one score, or one entry per token (language modelling)."""

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    labels: tuple[int, ...] | tuple[float]


def encode_classes(
    texts: Sequence[tuple[str, ...]], labels: Sequence[int] | Sequence[float], tokenizer: Any, length: int
) -> list[Example]:
    """Texts (or pairs) with the special tokens of the model, cut at `length` tokens; one class or score each."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=length)
    ids = encoded["input_ids"]
    kinds = encoded.get("token_type_ids") or [[0] * len(row) for row in ids]
    return [Example(tuple(row), tuple(kind), (label,)) for row, kind, label in zip(ids, kinds, labels, strict=True)]


def encode_language(texts: Sequence[tuple[str, ...]], tokenizer: Any, length: int) -> list[Example]:
    """Texts for next-token prediction, an end token after each. Of a pair, only the second part counts in the loss.

    A text longer than `length` tokens is cut at its end; of a pair, the prompt first loses its beginning, down to half
    of the length, so that there is always something to predict.

    Raises:
        InputError: a text without a single token to predict.
    """
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    examples = []
    for row, parts in enumerate(texts):
        pieces = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
        prompt = pieces[0] if len(pieces) == 2 else []
        room = length - len(begin)
        answer = (pieces[-1] + end)[: room - min(len(prompt), room // 2)]
        prompt = prompt[max(0, len(prompt) + len(answer) - room) :]
        ids = begin + prompt + answer
        skipped = max(len(begin) + len(prompt), 1)  # the first token has nothing before it
        labels = [IGNORED] * skipped + ids[skipped:]
        if len(ids) <= skipped:
            raise InputError(
                f"text {row} has no token to predict: {' | '.join(parts)[:60]!r}", fix="remove the rows without text"
            )
        examples.append(Example(tuple(ids), (0,) * len(ids), tuple(labels)))
    return examples


def collate(examples: Sequence[Example], padding: int, device: torch.device) -> dict[str, Tensor]:
    """A batch, padded on the right to its longest row: input_ids, attention_mask, token_type_ids (batch, time)."""
    width = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[tuple[float, ...]], fill: int) -> Tensor:
        return torch.tensor([row + (fill,) * (width - len(row)) for row in rows], device=device)

    ids = padded([example.ids for example in examples], padding)
    mask = padded([(1,) * len(example.ids) for example in examples], 0)
    kinds = padded([example.kinds for example in examples], 0)
    per_token = len(examples[0].labels) == len(examples[0].ids) and any(len(e.labels) > 1 for e in examples)
    labels = (
        padded([example.labels for example in examples], IGNORED)
        if per_token
        else torch.tensor([example.labels[0] for example in examples], device=device)
    )
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds, "labels": labels}
