"""The two tasks as tokens: texts to token ids and labels, and a batch of them to tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from florana.errors import InputError

Row = TypeVar("Row")

IGNORED = -100
"""The label of a position that counts in no loss."""


@dataclass(frozen=True)
class Example:
    """One row as tokens.

    Args:
        ids: token ids.
        kinds: token type ids, empty where the tokenizer makes none.
        labels: one class index, one score, or one entry per token (language modelling).
        starts: where each of several rows begins that were laid end to end (`packing`); empty for a row alone.
    """

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    labels: tuple[int, ...] | tuple[float]
    starts: tuple[int, ...] = ()


def encode_classes(
    texts: Sequence[tuple[str, ...]], labels: Sequence[int] | Sequence[float], tokenizer: Any, length: int
) -> list[Example]:
    """Texts (or pairs) with the special tokens of the model, cut at `length` tokens; one class or score each."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=length)
    ids = encoded["input_ids"]
    kinds = encoded.get("token_type_ids") or [[]] * len(ids)
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
        pieces = [tokens_of(tokenizer, part) for part in parts]
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
        examples.append(Example(tuple(ids), kinds_of(tokenizer, len(ids)), tuple(labels)))
    return examples


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a piece of text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def kinds_of(tokenizer: Any, length: int) -> tuple[int, ...]:
    """Token type ids for one text put together from pieces: the first kind; empty where the tokenizer makes none."""
    return (0,) * length if "token_type_ids" in tokenizer("a", add_special_tokens=False) else ()


def collate(examples: Sequence[Example], padding: int, device: torch.device, side: str = "right") -> dict[str, Tensor]:
    """A batch, padded to its longest row: what the tokenizer made of the texts, and the labels; no other input.

    Args:
        examples: the rows.
        padding: the token id that fills.
        device: where the tensors are put.
        side: `right` or `left`, where it is put.

    Returns:
        input_ids, attention_mask, token_type_ids where there are any (batch, time); labels (batch, time) or (batch,).
        Of rows that were laid end to end position_ids in the place of attention_mask, by which they are told apart.
    """
    width = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[tuple[float, ...]], fill: int) -> Tensor:
        fills = [(fill,) * (width - len(row)) for row in rows]
        whole = [row + more if side == "right" else more + row for row, more in zip(rows, fills, strict=True)]
        return torch.tensor(whole, device=device)

    batch = {
        "input_ids": padded([example.ids for example in examples], padding),
        "attention_mask": padded([(1,) * len(example.ids) for example in examples], 0),
    }
    if any(example.starts for example in examples):
        del batch["attention_mask"]
        batch["position_ids"] = torch.tensor([_positions(example, width) for example in examples], device=device)
    if all(example.kinds for example in examples):
        batch["token_type_ids"] = padded([example.kinds for example in examples], 0)
    per_token = len(examples[0].labels) == len(examples[0].ids) and any(len(e.labels) > 1 for e in examples)
    batch["labels"] = (
        padded([example.labels for example in examples], IGNORED)
        if per_token
        else torch.tensor([example.labels[0] for example in examples], device=device)
    )
    return batch


def _positions(example: Example, width: int) -> list[int]:
    """Counted anew from each start; the padding behind is one more row."""
    ends = [*example.starts[1:], len(example.ids), width] if example.starts else [len(example.ids), width]
    starts = [0, *ends[:-1]]
    return [position for start, end in zip(starts, ends, strict=True) for position in range(end - start)]


def batches(rows: Sequence[Row], size: int, length: Callable[[Row], int], *, together: bool) -> Iterator[Sequence[Row]]:
    """Rows in order of length, in batches; not `together`, each batch holds rows of one length, without padding.

    Examples:
        >>> [list(batches(["a", "bc", "de"], 2, len, together=together)) for together in (True, False)]
        [[['a', 'bc'], ['de']], [['a'], ['bc', 'de']]]
    """
    groups = [rows] if together else [list(same) for _, same in groupby(rows, length)]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]
