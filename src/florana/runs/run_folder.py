"""A run folder from outside: may this run have it, what does it hold, is nobody else at work in it.

Light to import: no training library.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from florana.atomic_files import explained
from florana.bounded import read_json, read_toml
from florana.displayable import log
from florana.errors import FederationError, InputError, RecipeError
from florana.federation.journal import read_records
from florana.federation.round_record import RoundRecord
from florana.recipe.load import check, differences, shaped
from florana.recipe.schema import Recipe

OUTCOME, PROGRESS, RUN_NAME = "outcome.json", "progress.jsonl", "run.json"
"""Of a run over the network: how it ended, a line per event, and the name by which sites keep what stays with them."""

LOCK = ".lock"
"""Held by whoever works in the run folder; its holder's death frees it."""

STUDY = "progress.json"
"""In a study's folder: its runs, and how far they were when it was begun or gone on with. For who watches it."""

BEFORE = {"spool", "log.txt", ".lock", OUTCOME, PROGRESS, RUN_NAME, "environment.json", "setup.json"}
"""What a run may leave in its folder before it has begun."""


SETUP_BYTES = 2**28
"""Of setup.json: a line per client."""


def check_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Raise RecipeError where the folder cannot take this run: taken, not a run, or made by another recipe."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--out {folder} is a file", fix="name a new folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise RecipeError(
            f"--out {folder} exists already",
            why="florana never writes over a run",
            fix="name a new folder, or add --resume to continue that run",
        )
    if not (folder / "recipe.toml").exists():
        if any(path.name not in BEFORE and not path.name.endswith(".tmp") for path in folder.iterdir()):
            raise RecipeError(f"--out {folder} is not a run folder", fix="name a new folder")
        return
    try:
        table = read_toml(folder / "recipe.toml")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'recipe.toml'} cannot be read", why=str(error)) from None
    old = check(table, str(folder / "recipe.toml"))
    may = ("federation.rounds:", "title:", "threads:", "engine.")
    changed = [line for line in differences(old, recipe) if not line.startswith(may)]
    recorded = recorded_threads(folder)
    if recipe.threads is not None and recorded not in (None, recipe.threads):
        changed.append(f"threads: {recorded} -> {recipe.threads}")
    if changed:
        raise RecipeError(
            f"{folder} was made by another recipe: " + "; ".join(changed),
            fix="resume with the same recipe (federation.rounds may grow), or name a new folder",
        )
    if recipe.federation.rounds < old.federation.rounds:
        raise RecipeError(
            f"{folder} was planned for {old.federation.rounds} rounds, the recipe asks for {recipe.federation.rounds}",
            fix="only more rounds can be added",
        )


def recorded_threads(folder: Path) -> int | None:
    """With how many threads the run in the folder works; None where there is none. Raises InputError."""
    if not (folder / "recipe.toml").exists():
        return None
    try:
        recorded = read_toml(folder / "recipe.toml").get("threads")
    except (OSError, ValueError) as error:
        raise InputError(f"the run folder {folder} cannot be read", why=str(error)) from None
    if recorded is None:  # older folders have it beside the versions alone
        recorded = read_environment(folder).get("torch_threads")
    return recorded if isinstance(recorded, int) and recorded > 0 else None


def read_environment(folder: Path) -> dict[str, Any]:
    """What the run in the folder began with, as `rounds.environment` wrote it; empty where there is none.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / "environment.json"
    return read_facts(path) if path.exists() else {}


def read_facts(path: Path) -> dict[str, Any]:
    """The table of named values that a file of a run folder holds.

    Args:
        path: setup.json, or another that florana wrote.

    Raises:
        InputError: it cannot be read, or is no table.
    """
    try:
        found = read_json(path, most=SETUP_BYTES)
        if not isinstance(found, dict):
            raise ValueError("it is no table of names and values")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read",
            why=str(error),
            fix="restore it from a copy; environment.json may be removed instead",
        ) from None
    return found


def _setup_in(path: Path) -> dict[str, Any]:
    """setup.json with what every reader of a run looks for. Raises InputError."""
    setup = read_facts(path)
    numbers = dict.fromkeys(("trainable_parameters", "base_parameters"), int)
    clients, kinds = setup.get("clients"), {"labels": list, "start": dict | None, **numbers}
    wrong = [name for name, kind in kinds.items() if not isinstance(setup.get(name), kind)]
    if not (isinstance(clients, dict) and all(isinstance(holds, dict) for holds in clients.values())):
        wrong.append("clients")
    if wrong:
        raise InputError(
            f"{path} is not what florana writes",
            why=f"it says nothing, or something else, of {', '.join(wrong)}",
            fix="restore it from a copy",
        )
    return setup


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[RoundRecord]]:
    """The recipe (a table of all its keys), setup.json and the committed rounds of a run folder. Raises InputError."""
    try:
        recipe = read_toml(folder / "recipe.toml")
        (folder / "setup.json").stat()
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is no run folder: {Path(str(error.filename)).name} is missing",
            fix="give a folder made by 'florana run' or 'florana demo'",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"the run folder {folder} cannot be read", why=str(error)) from None
    try:
        recipe = shaped(recipe, str(folder / "recipe.toml")).model_dump(exclude_none=True)
    except RecipeError as error:
        raise InputError(f"the run folder {folder} cannot be read", why=error.what) from None
    return recipe, _setup_in(folder / "setup.json"), read_records(folder / "rounds.jsonl")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One florana at a time in a run folder."""
    with held(
        folder / LOCK,
        FederationError(f"another florana is working in {folder}", fix="wait for it, or name another folder"),
        seconds=0.5,  # whoever looks whether somebody is at work holds it for a moment
    ):
        yield


def at_work(folder: Path) -> bool | None:
    """Whether a florana of this machine is working in a run folder; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    with contextlib.closing(os.fdopen(handle, "rb")):
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        return False


@contextmanager
def held(file: Path, taken: FederationError, seconds: float = 0.0) -> Iterator[None]:
    """A lock that its holder's death frees; `taken` is raised where somebody else has it for that long.

    Who holds it may take it again: whoever leads a run over the network holds it before the rounds begin.
    """
    with explained(file.parent, "the folder could not be locked"):
        lock = filelock.FileLock(file, is_singleton=True)
        try:
            lock.acquire(timeout=seconds)
        except filelock.Timeout:
            raise taken from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Write what florana logs meanwhile to `log.txt` in the folder."""
    handler = logging.FileHandler(folder / "log.txt", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.propagate = propagate
        log.removeHandler(handler)
        handler.close()
