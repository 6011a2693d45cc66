"""Whether the rows fit the model: their longest and their largest token id, against the tables that the model looks up.

What counts is what the model does, not what its configuration says: positions that are computed (rotary, ALiBi,
relative) have no end, a table of positions has, and so does the table of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from florana.errors import InputError
from florana.train.data.tokenize import Example
from florana.train.probe import Probed

_POSITIONS = ("position", "pos_emb", "wpe")
"""What stands in the names of tables of positions."""

_DECLARED = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")


def check_rows(bench: Probed, rows: Mapping[str, Mapping[int, Example]]) -> None:
    """Raise InputError where a row is longer than the model can read, or holds a token that it does not have.

    Args:
        bench: the model.
        rows: what they are called -> the rows by their numbers, from 0.
    """
    every = [(name, number + 1, row) for name, some in rows.items() for number, row in some.items()]
    if not every:
        return
    name, number, row = max(every, key=lambda item: max(item[2].ids))
    tokens = _tokens(bench.model)
    if tokens is not None and max(row.ids) >= tokens:
        raise InputError(
            f"{name}, row {number}: it has the token id {max(row.ids)}, but the model's embedding has {tokens} rows",
            why="the tokenizer knows tokens that the model lacks: tokens were added to it, or it is another model's",
            fix="set model.base to a folder in which model and tokenizer belong together",
        )
    name, number, row = max(every, key=lambda item: len(item[2].ids))
    room = min(_rooms(bench.model), default=None)
    if room is not None and len(row.ids) > room:
        raise _too_long(name, number, len(row.ids), f"the model has {room} positions", room)
    declared = _declared(bench.model.config)
    if declared is not None and len(row.ids) > declared and bench.device.type == "cpu":
        _try(bench, name, number, row, declared)


def _too_long(name: str, number: int, length: int, why: str, room: int) -> InputError:
    return InputError(
        f"{name}, row {number}: it is {length} tokens long, longer than the model can read",
        why=why,
        fix=f"set data.max_length = {room} or less; a model with more positions reads more",
    )


def _try(bench: Probed, name: str, number: int, row: Example, declared: int) -> None:
    """Read the longest row once: positions may be fixed in a way that no table shows."""
    batch = bench.batch([row])
    batch.pop("labels")
    bench.model.eval()
    try:
        with torch.inference_mode():
            bench.forward(batch)
    except Exception as error:  # models raise what they like
        why = f"the model says {declared} positions, and fails on it ({type(error).__name__}: {error})".splitlines()[0]
        raise _too_long(name, number, len(row.ids), why, declared) from None


def _tokens(model: Any) -> int | None:
    """How many tokens the model's embedding knows; None where it has none that says so."""
    table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    return int(weight.shape[0]) if weight is not None and weight.ndim == 2 else None


def _rooms(model: Any) -> Iterator[int]:
    """How many tokens each table of absolute positions has room for, beside what it keeps for padding."""
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1].lower()
        if not isinstance(module, torch.nn.Embedding) or not any(part in name for part in _POSITIONS):
            continue
        if any(part in path.lower() for part in ("vision", "visual", "image", "audio", "relative", "rel_")):
            continue
        yield module.num_embeddings - _kept_for_padding(module)


def _kept_for_padding(table: torch.nn.Embedding) -> int:
    """The rows before the first position: RoBERTa's begin after the padding id, BART's and OPT's at an offset."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _declared(config: Any) -> int | None:
    own = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(own, name, None) for name in _DECLARED)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
