"""The documentation says what the code does: commands, options, names, recipes and pages made from it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

import florana
import florana.flower
from florana.cli.main import app
from florana.recipe.load import check
from florana.strategy.conformance import check_rule
from florana.strategy.custom import load_rule
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Every line of a code block that calls florana, without its prompt and its comment."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = (re.sub(r"^[\w-]*\$ ", "", line).strip() for _, block in blocks for line in block.splitlines())
    return [line.removesuffix("&") for line in lines if line.startswith("florana ") and "[OPTIONS]" not in line]


def fault(line: str) -> str | None:
    """What click does not know of a command line."""
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"no command '{words[0]}'"
        command = command.commands[words.pop(0)]
    known = {name for param in command.params for name in getattr(param, "opts", ())}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in {*known, "--help"}]
    return f"no option {unknown[0]}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_exists(page: Path) -> None:
    assert [(line, fault(line)) for line in commands(page) if fault(line)] == []


def test_a_command_that_does_not_exist_is_told() -> None:
    assert len(commands(ROOT / "README.md")) == 7
    assert fault("florana mrege a b") == "no command 'mrege'"
    assert fault("florana flower keys x --ot y") == "no option --ot"


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_the_reference_pages_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_studys_tables_are_what_its_files_say() -> None:
    command = [sys.executable, "scripts/study_table.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_key_of_a_recipe_has_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", (DOCS / "recipe.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 80
    assert [name for name, meaning in rows if not meaning.strip()] == []


def test_every_public_name_has_its_place_in_the_reference() -> None:
    shown = set(re.findall(r"^::: florana\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE))
    assert shown == set(florana.__all__)
    page = (DOCS / "api-flower.md").read_text()
    shown = set(re.findall(r"^::: florana\.flower\.(\w+)$", page, flags=re.MULTILINE))
    shown |= set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert shown == set(florana.flower.__all__) - {"require_flwr"}


def test_the_rule_of_ones_own_passes_the_contract(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS / "own-rule.md").read_text(), flags=re.DOTALL)
    assert code is not None
    (tmp_path / "my_file.py").write_text(code[1])
    check_rule(load_rule(f"{tmp_path / 'my_file.py'}:my_rule"), "my_rule")


@pytest.mark.parametrize("name", ["own-data.md", "sites.md"])
def test_a_whole_recipe_on_a_page_is_one(name: str) -> None:
    recipe = re.search(r"```toml\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)
    assert recipe is not None
    check(tomllib.loads(recipe[1]), name)


def test_every_recipe_is_in_the_table_of_recipes() -> None:
    table = (DOCS / "tasks.md").read_text().partition("## Recipes to begin with")[2]
    for path in (ROOT / "recipes").glob("*.toml"):
        assert f"`{path.stem}`" in table, path.stem
