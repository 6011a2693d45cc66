"""A Flower app on disk that runs a recipe: `flwr run` takes it, in a simulation and in a deployment, unchanged."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import tomli_w

from florana.atomic_files import replace_file
from florana.errors import RecipeError
from florana.flower.app.settings import Settings, to_config
from florana.recipe.schema import Recipe
from florana.strategy.custom import plain_name

LONGEST_NAME = 32
"""Of an app; Flower refuses longer ones."""

_README = """# {title}

A Flower app that runs a florana recipe. It holds no weights and no data; florana must be installed where it runs.

    flwr run . --stream --federation-config "num-supernodes={clients}"      # a simulation, one node per client
    flwr run . --run-config "federation.rounds=3"            # any key of pyproject.toml can be set
    flwr run . deployment --run-config "run.out='/srv/run'"   # a SuperLink that is there already
    florana serve, florana join                              # a whole deployment over TLS: see docs/sites.md
"""
_MODULE = '''"""{what}"""

from florana.flower.app.{name} import app

__all__ = ["app"]
'''
_MODULES = {
    "server_app": "The server side: florana's round loop.",
    "client_app": "The client side: the training of a simulated client.",
}


def export(recipe: Recipe, folder: Path, settings: Settings | None = None) -> Path:
    """Write the app into a new folder and return it.

    Raises:
        RecipeError: the folder exists.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} exists already", fix="name a new folder")
    if recipe.privacy.secure_aggregation or recipe.privacy.unit is not None:
        key = "secure_aggregation" if recipe.privacy.secure_aggregation else "unit"
        raise RecipeError(
            f"privacy.{key} does not run in an exported app",
            why="Flower begins its clients anew for every message, and secrets and budgets would not last",
            fix="run it with 'florana run', or between sites with 'florana serve' and 'florana join'",
        )
    title = recipe.title or f"{plain_name(recipe.strategy['name'])} on {Path(recipe.data.train).name}"
    config = to_config(recipe, settings or Settings(out=str((folder / "run").resolve())))
    package = "florana_app"
    project = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "name": app_name(title),
            "version": "1.0.0",
            "description": title,
            "license": "Apache-2.0",
            # florana is installed at the sites, not by Flower: the app asks the index for nothing else
            "dependencies": ["flwr>=1.41,<2"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "florana",
                    "components": {
                        "serverapp": f"{package}.server_app:app",
                        "clientapp": f"{package}.client_app:app",
                    },
                    "config": _nested(config),
                },
            },
            "hatch": {"build": {"targets": {"wheel": {"packages": [package]}}}},
            "florana": {"version": importlib.metadata.version("florana")},
        },
    }
    (folder / package).mkdir(parents=True)
    replace_file(folder / "pyproject.toml", tomli_w.dumps(project).encode())
    replace_file(folder / "README.md", _README.format(title=title, clients=recipe.partition.clients or 2).encode())
    replace_file(folder / package / "__init__.py", b"")
    for name, what in _MODULES.items():
        replace_file(folder / package / f"{name}.py", _MODULE.format(what=what, name=name).encode())
    return folder


def app_name(title: str) -> str:
    """A name that Flower takes for an app: a letter first, then letters, digits and hyphens, at most 32 in all.

    Args:
        title: of the recipe; as many of its words are kept as there is room for.

    Examples:
        >>> app_name("Topics of the Python standard library"), app_name("3 hospitals")
        ('topics-of-the-python-standard', 'florana-3-hospitals')
    """
    words = re.findall(r"[a-z0-9]+", title.lower()) or ["app"]
    words = words if words[0][0].isalpha() else ["florana", *words]
    name, rest = str(words[0]), words[1:]
    for word in rest:
        if len(name) + 1 + len(word) > LONGEST_NAME:
            break
        name += f"-{word}"
    return name[:LONGEST_NAME]


def _nested(config: dict[str, str | int | float | bool]) -> dict[str, object]:
    """`a.b` as a table: Flower joins them with dots again."""
    nested: dict[str, object] = {}
    for key, value in config.items():
        section, dot, name = key.partition(".")
        if dot:
            table = nested.setdefault(section, {})
            assert isinstance(table, dict)
            table[name] = value
        else:
            nested[section] = value
    return nested
