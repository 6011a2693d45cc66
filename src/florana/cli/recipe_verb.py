"""The verb `recipe`: what can stand in one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def recipe(
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="One key, like train.proximal_mu.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Explain a key of a recipe, or list them all.

    Example: florana recipe --explain train.proximal_mu
    """
    from florana.cli.console import console_of
    from florana.recipe.explain import explained, keys_of, sections

    console = console_of(as_json)
    if explain is not None:
        chosen = [explained(explain)]
    else:
        chosen = [key for section, model in sections() for key in keys_of(section, model)]
    if as_json:
        typer.echo(json.dumps([asdict(key) for key in chosen], indent=1))
    elif console and explain is not None:
        key = chosen[0]
        console.print(f"{key.path}: {key.meaning}", highlight=False, soft_wrap=True)
        console.print(f"takes: {key.kind.replace('`', '')}", highlight=False, soft_wrap=True)
        console.print(f"default: {key.default or 'it must be given'}", highlight=False)
        example = key.default if key.default not in ("", "none") else "..."
        where = f"[{key.section}]\n" if key.section else ""
        console.print(f"in a recipe:\n\n{where}{key.name} = {example}", highlight=False)
    elif console:
        for key in chosen:
            console.print(f"{key.path} = {key.default or '(required)'}", highlight=False, soft_wrap=True)
