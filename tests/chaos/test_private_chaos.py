"""A site that is killed at each of the files it opens counts no less of its privacy budget than has left it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from florana.dp.ledger import Ledger
from florana.errors import BudgetSpent
from florana.runs.prepared import prepare
from florana.runs.private_runs import LEDGER
from tests.chaos.counts import Tally, often
from tests.program import struck
from tests.test_private import at, private

STEPS = 19
"""Files that a site of four rounds opens for its budget."""


def sends(table: dict[str, Any], folder: str, sent: str) -> None:
    """A site that sends until its budget is spent, noting each update that has left."""
    recipe = private(table, privacy={"max_rounds": 4})
    site, brief = at(recipe, prepare(recipe), Path(folder) / "kept", site=True)
    with contextlib.suppress(BudgetSpent):
        for round_ in range(1, 9):
            site.fit(dataclasses.replace(brief, round=round_), {})
            with Path(sent).open("a") as stream:
                stream.write(f"{round_}\n")


def killed(table: dict[str, Any], folder: Path, step: int) -> int:
    """Such a site, killed at a step and begun again: what it counts is never less than what left. How much more."""
    (folder / "kept").mkdir(parents=True)
    sent = folder / "sent"
    sent.touch()
    given = (table, str(folder), str(sent))
    assert struck(sends, given, folder / "kept", step, committing=False)
    before = len(sent.read_text().splitlines())
    assert before <= len(Ledger(folder / "kept" / LEDGER).charges() if (folder / "kept" / LEDGER).exists() else [])
    assert not struck(sends, given, folder / "kept", 10_000, committing=False)
    charges, left = Ledger(folder / "kept" / LEDGER).charges(), len(sent.read_text().splitlines())
    assert left <= len(charges) == 4
    assert left >= 3, "a kill costs one round at most"
    return len(charges) - left


@often(1, 50)
def test_a_killed_site_never_counts_too_little(
    count: int, recipe_table: dict[str, Any], tmp_path: Path, tally: Tally
) -> None:
    more = [killed(recipe_table, tmp_path / str(number), 1 + 8 * number % STEPS) for number in range(count)]
    assert max(more) <= 1
    tally("SIGKILL of a site that spends a privacy budget", count, f"none counted less than left it, {sum(more)} more")
