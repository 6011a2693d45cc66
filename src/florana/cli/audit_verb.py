"""The verb `audit`: parses, audits, prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def audit(
    run: Annotated[Path, typer.Argument(help="A run folder whose recipe has privacy.unit.")],
    canaries: Annotated[int, typer.Option(min=4, max=100_000, help="Made-up rows for each client.")] = 100,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of its recipe; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Train once more with canaries among the rows, and see how much of them the updates tell.

    Half of the canaries are trained on. Whoever watches the updates guesses which; the more guesses are right, the
    larger is the epsilon that the run has at least. It must stay below the one that is stated.

    Example: florana audit runs/private
    """
    from florana.cli.console import console_of
    from florana.runs.canary_audit import audit_run

    console = console_of(as_json)
    found = audit_run(run, canaries, set_ or [])
    if not console:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    verdict = "as it should be" if found.at_least <= found.stated else "MORE THAN IS STATED: please report this"
    spent = f"{found.spent:.4g}" if found.spent is not None else f"at most {found.stated:g}"
    for line in (
        f"{found.right} of {found.guesses} guesses right, of {found.canaries} canaries over {found.rounds} rounds",
        f"epsilon is at least {found.at_least:.3g} (95 % confidence), at delta = {found.delta:g}",
        f"stated {found.stated:g}, spent {spent} by the accountant: {verdict}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
