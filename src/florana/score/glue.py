"""The GLUE tasks as one table: columns, labels, metrics and splits (Wang et al., arXiv 1804.07461).

A recipe names one by `data.glue`. Columns, label order and splits are those of the hub's `nyu-mll/glue`; files of
GLUE's own distribution have other headers for some tasks, and both are read. The metrics are GLUE's: the first is the
one that tables and pictures show, all stand in the journal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GlueName = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]

HUB = "nyu-mll/glue"
"""Where the hub has all of them; the name of the task is the configuration."""

Columns = tuple[tuple[str, ...], str]
"""(the columns of the text, the column of the label)."""


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Args:
        columns: as the hub calls them.
        labels: the classes by index; none for STS-B, whose label is a score.
        metrics: GLUE's own.
        tsv: the columns of GLUE's own files, where they differ.
        test: the split with labels that is measured on.
        mismatched: the second split that is measured on, of MNLI.
    """

    columns: Columns
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    tsv: Columns | None = None
    test: str = "validation"
    mismatched: str | None = None


_PAIR = ("sentence1", "sentence2")

GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask((("sentence",), "label"), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": GlueTask((("sentence",), "label"), ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(
        (_PAIR, "label"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        tsv=(("#1 String", "#2 String"), "Quality"),
    ),
    "qqp": GlueTask(
        (("question1", "question2"), "label"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        tsv=(("question1", "question2"), "is_duplicate"),
    ),
    "stsb": GlueTask((_PAIR, "label"), (), ("pearson", "spearman"), tsv=(_PAIR, "score")),
    "mnli": GlueTask(
        (("premise", "hypothesis"), "label"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy", "accuracy_mismatched"),
        tsv=(_PAIR, "gold_label"),
        test="validation_matched",
        mismatched="validation_mismatched",
    ),
    "qnli": GlueTask((("question", "sentence"), "label"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": GlueTask((_PAIR, "label"), ("entailment", "not_entailment"), ("accuracy",)),
}

HIGHEST_SCORE = 5.0
"""STS-B's scores go from 0 to 5."""


def glue_label(name: str, value: object) -> int | float:
    """The index of a class, or the score of STS-B: from a number, its text, or the class's name.

    Raises:
        ValueError: the value is none of the task's labels; the text says what the labels are.

    Examples:
        >>> glue_label("rte", "not_entailment"), glue_label("mrpc", "1"), glue_label("stsb", "3.8")
        (1, 1, 3.8)
    """
    labels = GLUE[name].labels
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if number == -1:
        raise ValueError("the label is -1: GLUE's test split comes without labels")
    if not labels:
        if 0 <= number <= HIGHEST_SCORE:
            return number
        raise ValueError(f"the label is {value!r}; the scores of '{name}' go from 0 to {HIGHEST_SCORE:g}")
    if number in range(len(labels)):
        return int(number)
    listed = ", ".join(f"{index} ({label})" for index, label in enumerate(labels))
    raise ValueError(f"the label is {value!r}; the labels of '{name}' are {listed}")
