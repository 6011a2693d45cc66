"""Flower's client program, held to the ClientApp that is installed here: code that the server sent is never run.

Flower sends the code of an app to every node that is to run it. A site would thus run whatever its operator, or someone
who took over the operator's machine, puts into the app. `florana join` has Flower start this program in the place of
`flwr-clientapp`: the same program, which neither unpacks the app nor loads anything of it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

from florana.errors import RecipeError

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

_PROGRAM = "flwr.supernode.runtime.run_clientapp"
_LOADS = ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn")


def holdable() -> ModuleType:
    """Flower's program as a module, with the ways to the server's code that are known here.

    Raises:
        RecipeError: this version of Flower goes other ways.
    """
    try:
        program = import_module(_PROGRAM)
        missing = [name for name in _LOADS if not hasattr(program, name)]
    except ImportError:
        missing = [_PROGRAM]
    if missing:
        raise RecipeError(
            f"Flower {version('flwr')} cannot be held to the code that is installed here",
            why=f"it has no {', '.join(missing)}: it may run the code that the server sends",
            fix="pip install 'florana[flower]' installs a version that can",
        )
    return program


def hold() -> ModuleType:
    """In this process, put florana's own app in the place of the server's code. Raises as `holdable` does."""
    program = holdable()
    program.install_from_fab = _nothing  # type: ignore[attr-defined]
    program.install_app_dependencies = _nothing  # type: ignore[attr-defined]
    program.get_load_client_app_fn = _loader  # type: ignore[attr-defined]
    return program


def _nothing(*_: object, **__: object) -> None:
    return None


def _loader(*_: object, **__: object) -> object:
    def load(*_: object, **__: object) -> ClientApp:
        from florana.flower.client_app import app

        return app

    return load


def main() -> None:
    """Be `flwr-clientapp`, held."""
    hold()
    from flwr.supernode.cli import flwr_clientapp

    flwr_clientapp()


if __name__ == "__main__":
    main()
