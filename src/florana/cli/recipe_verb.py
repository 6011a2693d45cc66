"""The verbs `recipe` and `init`: what can stand in a recipe, and a first one for a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from florana.cli.say import say
from florana.errors import RecipeError


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


def init(
    data: Annotated[Path, typer.Argument(help="A csv, tsv, jsonl, json or parquet file.")],
    out: Annotated[Path, typer.Option(help="The recipe to write; one that exists is not replaced.")] = Path(
        "recipe.toml"
    ),
    encoding: Annotated[str, typer.Option(help="Of the file, where it is not UTF-8: cp1252, latin-1.")] = "utf-8",
) -> None:
    """Look at a file of rows, and write a first recipe for it, with comments.

    Example: florana init reviews.csv
    """
    from florana.atomic_files import explained, replace_file
    from florana.recipe.load import read_recipe
    from florana.train.data.first_recipe import first_recipe

    if out.exists():
        raise RecipeError(f"{out} exists already", fix="name another file by --out")
    text = first_recipe(data, out, encoding)
    with explained(out.parent, "the recipe could not be written", "try again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, text.encode())
    made = read_recipe(out)
    say(f"{out}: {made.task} of {data}\nlook at it, then: florana run {out} --dry-run")
