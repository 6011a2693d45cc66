"""The data's rows as examples at their places: each client's own, and the common test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from florana.errors import InputError
from florana.recipe import schema as r
from florana.train.client import ClientData
from florana.train.data.instructions import Encoded, encode_instructions
from florana.train.data.packing import packed
from florana.train.data.partition import Share, binned, deal, table_of
from florana.train.data.sources import Tables, texts
from florana.train.data.tokenize import Example, encode_classes, encode_language
from florana.train.limits import check_rows
from florana.train.model import Workbench
from florana.train.probe import require_apart


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a run.

    Args:
        clients: client -> its rows.
        common: the common test set.
        more: further ones, by the ending of their figures.
        facts: who holds what, as setup.json has it; of instructions also `left_out` and `cut_responses`.
        validation: the rows to choose by, which nothing else uses; may be empty.
    """

    clients: Mapping[str, ClientData]
    common: tuple[Example, ...]
    more: Mapping[str, tuple[Example, ...]]
    facts: Mapping[str, Any]
    validation: tuple[Example, ...] = ()


def rows_of(recipe: r.Recipe, bench: Workbench, tables: Tables) -> Rows:
    """The tables as tokens, the training rows dealt out. Raises InputError where they cannot be."""
    if recipe.evaluate.by == "f1" and len(tables.labels) != 2:
        raise InputError(
            "evaluate.by is 'f1', that of the second of two classes",
            why=f"there are {len(tables.labels)}",
            fix="set evaluate.by = 'macro_f1'",
        )
    train = encode(recipe.data, bench.tokenizer, tables.train, tables.target, recipe.data.train)
    test = encode(recipe.data, bench.tokenizer, tables.test, tables.target, recipe.data.test or recipe.data.train)
    more = {name: encode(recipe.data, bench.tokenizer, own, tables.target, name) for name, own in tables.more.items()}
    chosen_by = tables.validation if tables.validation is not None else tables.test.select([])
    name = recipe.data.validation or f"{recipe.data.train} (validation rows)"
    validation = encode(recipe.data, bench.tokenizer, chosen_by, tables.target, name)
    encoded = {"data.train": train, "data.test": test} | {f"data.test_{name}": own for name, own in more.items()}
    encoded |= {"data.validation": validation}
    check_rows(bench, {name: dict(zip(own.kept, own.examples, strict=True)) for name, own in encoded.items()})
    table, by, classes, labels = _classes(recipe, tables)
    if train.left_out:
        table = table.select(train.kept)
    shares = deal(table, recipe.partition, by, _lengths(recipe, table, train.examples), recipe.seed)
    facts = table_of(shares, classes, labels)
    if recipe.data.instructions is not None:
        parts = {"train": train, "test": test} | ({"validation": validation} if validation.examples else {})
        facts |= {"left_out": {name: part.left_out for name, part in parts.items()}}
        facts |= {"cut_responses": {name: part.cut for name, part in parts.items()}}
    pack_to = recipe.data.max_length if recipe.train.packing else None
    if pack_to:
        require_apart(bench, recipe.model.base)
    return Rows(
        clients={client: _client_data(share, train.examples, pack_to) for client, share in shares.items()},
        common=tuple(test.examples),
        more={name: tuple(own.examples) for name, own in more.items()},
        facts=facts,
        validation=tuple(validation.examples),
    )


def _classes(
    recipe: r.Recipe, tables: Tables
) -> tuple[datasets.Dataset, str | None, Sequence[int] | None, tuple[str, ...]]:
    """(the table to deal out, the column of classes, their indices, their names); scores count by their bins."""
    if recipe.task == "causal-lm" or tables.target is None:
        return tables.train, recipe.data.label, None, ()
    values = list(tables.train[tables.target])
    if recipe.task == "sequence-classification":
        return tables.train, recipe.data.label, values, tables.labels
    bins, names = binned(values, recipe.partition.bins)
    column = "score bin"
    while column in tables.train.column_names:
        column += "_"
    return tables.train.add_column(column, bins), column, bins, names


def _lengths(recipe: r.Recipe, table: datasets.Dataset, examples: Sequence[Example]) -> list[int]:
    """The length of each row, to deal out by: letters of its text; tokens, where a template made it."""
    if recipe.data.instructions is not None:
        return [len(example.ids) for example in examples]
    return [sum(len(part) for part in row) for row in texts(table, recipe.data.text)]


def encode(settings: r.Data, tokenizer: Any, table: datasets.Dataset, target: str | None, source: str) -> Encoded:
    """The rows of a table as tokens; `target` is the column of classes or scores, None for language."""
    every = list(range(len(table)))
    if not every:
        return Encoded([], every)
    if settings.instructions is not None:
        return encode_instructions(table, settings, tokenizer, source)
    rows = texts(table, settings.text)
    if target is None:
        return Encoded(encode_language(rows, tokenizer, settings.max_length), every)
    return Encoded(encode_classes(rows, list(table[target]), tokenizer, settings.max_length), every)


def _client_data(share: Share, examples: Sequence[Example], pack_to: int | None) -> ClientData:
    rows = [examples[row] for row in share.train]
    return ClientData(rows, [examples[row] for row in share.test], packed(rows, pack_to) if pack_to else rows)
