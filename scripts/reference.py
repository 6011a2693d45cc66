"""Write docs/recipe.md from the recipe's schema, and docs/cli.md from the commands.

python scripts/reference.py            write both
python scripts/reference.py --check    end with code 1 where one of them is not what the code says
"""

from __future__ import annotations

import re
from pathlib import Path

import typer.cli
import typer.main
from generated import settle
from pydantic import BaseModel

from florana.cli.main import app
from florana.recipe.explain import keys_of, sections

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
| 4 | the federation could not go on, or a disk refused |
| 130 | Ctrl-C: what was committed stands, and the last line says how to go on |

Errors say what is wrong, where, why, and what to do about it, on standard error. `--json` prints one object on standard
output and nothing else.
"""


def rows(section: str, model: type[BaseModel]) -> list[str]:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key in keys_of(section, model):
        default = "**required**" if not key.default else key.default if key.default == "none" else f"`{key.default}`"
        cells = [f"`{key.name}`", key.kind, default, key.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines


def recipe_page() -> str:
    """docs/recipe.md: a table for each section."""
    lines = [RECIPE]
    for name, section in sections():
        if name == "server":
            lines += [STRATEGY.rstrip(), ""]
        title = f"## [{name}]" if name else "## At the top"
        lines += [title, "", *([(section.__doc__ or "").strip(), ""] if name else []), *rows(name, section), ""]
    return "\n".join(lines).rstrip() + "\n"


def cli_page() -> str:
    """docs/cli.md: typer's own page of the commands, below the exit codes."""
    command = typer.main.get_command(app)
    text = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command), name="florana")
    text = re.sub(r"^# `florana`\n", "## All commands\n", text)
    text = re.sub(r"^Example: (.*)$", r"Example: `\1`", text, flags=re.MULTILINE)
    return CLI + "\n" + text.strip() + "\n"


def main() -> None:
    wanted = {ROOT / "docs" / "recipe.md": recipe_page(), ROOT / "docs" / "cli.md": cli_page()}
    settle(wanted)


if __name__ == "__main__":
    main()
