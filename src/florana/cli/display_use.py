"""What a person sees of a finished model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

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
