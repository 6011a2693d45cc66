"""What a person sees of adapters on disk: what they are, what a merge would lose, what a finished model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from florana.report.page import size

if TYPE_CHECKING:
    from florana.adapters.inspect import Inspection, Sheet

OTHERS = 2
"""How many classes stand beside the best one."""


def answers_table(answers: Sequence[Mapping[str, Any]]) -> Table:
    """A line per text: its class with the probability and the nearest others, or its score."""
    scores = "score" in answers[0]
    table = Table(title_justify="left")
    table.add_column("text", ratio=3, overflow="fold")
    table.add_column("score" if scores else "class")
    if not scores:
        table.add_column("probability", justify="right")
        table.add_column("others", overflow="fold")
    for answer in answers:
        if scores:
            table.add_row(answer["text"], f"{answer['score']:.4f}")
            continue
        ranked = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[1 : OTHERS + 1]
        others = ", ".join(f"{name} {share:.2f}" for name, share in ranked)
        table.add_row(answer["text"], answer["label"], f"{answer['probability']:.3f}", others)
    return table


def inspection_tables(result: Inspection) -> list[Table | str]:
    """The adapters, with what they have in common in lines below; their overlap; what each choice loses."""
    facts = [facts_of(sheet) for sheet in result.sheets]
    common = {name: value for name, value in facts[0].items() if all(other[name] == value for other in facts)}
    adapters = Table(title="Adapters", title_justify="left")
    for column in ("adapter", "rank", "parameters", "file", "norm"):
        adapters.add_column(column, justify="left" if column == "adapter" else "right", overflow="fold")
    for s in result.sheets:
        ranks = ", ".join(map(str, s.ranks))
        adapters.add_row(s.name, ranks, str(s.parameters), size(s.bytes), f"{s.norm:.4g}")
    told: list[Table | str] = [adapters, *(f"{name}: {value}" for name, value in common.items())]
    for sheet, own in zip(result.sheets, facts, strict=True):
        apart = [f"{name} {value}" for name, value in own.items() if name not in common]
        told += [f"{sheet.name}: {'; '.join(apart)}"] if apart else []
    if len(result.sheets) == 1:
        return told
    overlap = Table()
    overlap.add_column("")
    for s in result.sheets:
        overlap.add_column(s.name, justify="right", overflow="fold")
    for s, row in zip(result.sheets, result.overlap, strict=True):
        overlap.add_row(s.name, *(f"{value:.2f}" for value in row))
    choices = Table(title="What a merge would lose", title_justify="left")
    for column in ("method", "rank", "relative error", "bytes"):
        choices.add_column(column, justify="left" if column == "method" else "right")
    for c in result.choices:
        choices.add_row(c.method, str(c.rank), "exact" if c.error < 1e-6 else f"{c.error:.4f}", size(c.bytes))
    return [*told, "", "Overlap of their updates' column spaces: 1 the same, 0 orthogonal", overlap, choices]


def facts_of(sheet: Sheet) -> dict[str, str]:
    """What an adapter says of itself, in words."""
    return {
        "base model": sheet.base_model or "not named",
        "task": sheet.task or "not named",
        "kind": sheet.variant,
        "modules": f"{sheet.modules} ({', '.join(sheet.targets)})",
        "scaling": ", ".join(f"{x:g}" for x in sheet.scalings),
        "dtype": ", ".join(sheet.dtypes),
        "trained whole": ", ".join(sheet.extra) or "nothing",
    }
