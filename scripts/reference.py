"""Write docs/recipe.md from the recipe's schema, and docs/cli.md from the commands.

python scripts/reference.py            write both
python scripts/reference.py --check    end with code 1 where one of them is not what the code says
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.cli
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from florana.cli.main import app
from florana.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """# The recipe

A run is one TOML file. Every section and every key stands below; a key that does not is refused with the nearest one
that does. Relative paths count from the recipe's own folder. `--set section.key=value` on the command line changes one
key, and the run folder keeps the whole recipe as it was executed. Written by `scripts/reference.py` from the schema.
"""

STRATEGY = """
## [strategy]

`name`, and the method's own options, which [The methods](methods.md) lists for each. `name = "my_file.py:my_rule"`
takes [a rule of your own](own-rule.md).
"""

CLI = """# Command line

Written by `scripts/reference.py` from the commands themselves.

## Exit codes

| code | meaning |
|---:|---|
| 0 | done |
| 1 | a bug in florana; its traceback is in the log that the message names |
| 2 | usage, or a recipe that cannot be run |
| 3 | input that is unreadable or does not fit together |
| 4 | the federation could not go on |
| 130 | Ctrl-C: what was committed stands, and the last line says how to go on |

Errors say what is wrong, where, why, and what to do about it, on standard error. `--json` prints one object on standard
output and nothing else.
"""


def kind_of(annotation: Any) -> str:
    """A type as a reader of TOML would say it.

    >>> kind_of(list[int] | None)
    'list of whole number'
    """
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(inside[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(one) for one in inside if one is not type(None)))
    if origin is list:
        return f"list of {kind_of(inside[0])}"
    if origin is dict:
        return f"table: {kind_of(inside[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, "any")


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value).replace(chr(39), chr(34))}`"


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section behind a key, for tables like [model]."""
    options = [annotation, *get_args(annotation)]
    return [one for one in options if isinstance(one, type) and issubclass(one, BaseModel)]


def rows(model: type[BaseModel]) -> list[str]:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if sections_of(field.annotation) or name == "strategy":
            continue
        cells = [f"`{name}`", kind_of(field.annotation), default_of(field), " ".join((field.description or "").split())]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines


def recipe_page() -> str:
    """docs/recipe.md: a table for each section."""
    lines = [RECIPE, "## At the top", "", *rows(Recipe)]
    for name, field in Recipe.model_fields.items():
        if name == "strategy":
            lines.append(STRATEGY.rstrip())
        for section in sections_of(field.annotation):
            lines += ["", f"## [{name}]", "", (section.__doc__ or "").strip(), "", *rows(section)]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """docs/cli.md: typer's own page of the commands, below the exit codes."""
    command = typer.main.get_command(app)
    text = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command), name="florana")
    text = re.sub(r"^# `florana`\n", "## All commands\n", text)
    text = re.sub(r"^Example: (.*)$", r"Example: `\1`", text, flags=re.MULTILINE)
    return CLI + "\n" + text.strip() + "\n"


def main() -> None:
    wanted = {ROOT / "docs" / "recipe.md": recipe_page(), ROOT / "docs" / "cli.md": cli_page()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the code says: run python scripts/reference.py")
        sys.exit(1 if stale else 0)
    for path in stale:
        path.write_text(wanted[path])


if __name__ == "__main__":
    main()
