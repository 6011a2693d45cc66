"""A site's side: the trainer with the model, and a SuperNode that asks it whenever the server has work."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from florana import recipe as r
from florana.errors import FederationError, InputError
from florana.flower.frames import Frame
from florana.flower.invitation import Invitation
from florana.flower.keys import read_private
from florana.flower.processes import Child, free_port, on_path, start
from florana.flower.reach import clock_difference
from florana.flower.serve import POLL
from florana.flower.site import Site, site_of
from florana.flower.site_programs import site_programs
from florana.flower.trainer import answer_until, listening
from florana.run import Setup, prepare
from florana.whole_files import explained

SAID = (
    ("2004", "the server does not know this site's key: the operator approves it with 'florana flower approve'"),
    ("412", "the server does not know this site's key: the operator approves it with 'florana flower approve'"),
)
"""What a SuperNode writes, and what it means."""


def prepare_site(recipe: r.Recipe, who: str, data: Path | None) -> Setup:
    """The model, and this site's rows: a file of its own, or its share of data that every site has.

    Raises:
        InputError: the file cannot be read or does not fit the recipe, or it is missing.
    """
    if recipe.partition.kind != "sites":
        if data is not None:
            raise InputError(
                f"--data {data} is given, but the recipe deals out one data set to all",
                fix="leave --data out, or ask the operator for a recipe with partition.kind = 'sites'",
            )
        return prepare(recipe)
    if data is None:
        raise InputError("--data is missing", why="the recipe says that each site has a file of its own")
    return prepare(recipe, {who: data})


def join(
    recipe: r.Recipe,
    invitation: Invitation,
    keys: Path,
    data: Path | None,
    *,
    done: threading.Event,
    say: Callable[[str], None] = lambda text: None,
    step: Callable[[str], None] = lambda client: None,
) -> None:
    """Take part until `done` is set, or the SuperNode gives up.

    Args:
        recipe: `invitation.site_recipe`. keys: the site's folder, with its private key; what the client keeps
            between rounds is written below it.

    Raises:
        InputError: key, model or data cannot be used. FederationError: the server refuses this site.
    """
    who, key = read_private(keys)
    setup = prepare_site(recipe, who, data)
    site = site_of(recipe, setup, who, keys / "kept", step)
    say(f"{who}: {site.card.introduced(None)}; connecting to {invitation.address}")
    if not _reached(invitation, done, say):
        return
    with explained(keys, "the site's folder could not be written"):
        (keys / "flower" / "home").mkdir(parents=True, exist_ok=True)
    work = keys / "flower"
    home = {"FLWR_HOME": str((work / "home").resolve()), **POLL}
    with listening() as listener, site_programs(work / "clientapp.log", home) as programs:
        node = _supernode(invitation, key, who, listener.path, work, home | on_path(programs))
        watcher = threading.Thread(target=_watch, args=(node, done), daemon=True)
        watcher.start()
        try:
            answer_until(listener, lambda frame: _told(site, frame, say), done)
        finally:
            alive = node.running()
            node.end()
    if not alive:
        text = node.tail(40)
        why = next((meaning for sign, meaning in SAID if sign in text), "")
        raise FederationError(
            "Flower's SuperNode ended", why=why or text, fix=f"its log is {node.log}; mend it and join again"
        )


def _reached(invitation: Invitation, done: threading.Event, say: Callable[[str], None]) -> bool:
    """Wait until the server is there; False where `done` was set before. Raises FederationError: see `reach`."""
    told = False
    while not done.is_set():
        try:
            clock_difference(invitation)
        except OSError as error:
            if not told:
                say(f"the server is not there yet ({error.strerror or type(error).__name__}); waiting for it")
            told = True
            done.wait(1.0)
        else:
            return True
    return False


def _supernode(
    invitation: Invitation, key: Path, who: str, trainer: Path, work: Path, environment: Mapping[str, str]
) -> Child:
    log = work / "supernode.log"
    log.unlink(missing_ok=True)
    config = f"client={json.dumps(who)} trainer={json.dumps(str(trainer))}"
    return start(
        [
            "flower-supernode",
            f"--superlink={invitation.address}",
            f"--root-certificates={invitation.authority.resolve()}",
            f"--auth-supernode-private-key={key.resolve()}",
            f"--port={free_port()}",
            f"--node-config={config}",
        ],
        log,
        environment,
    )


def _told(site: Site, frame: Frame, say: Callable[[str], None]) -> Frame:
    brief = frame.fields.get("brief")
    if isinstance(brief, dict):
        say(f"{site.who}: round {brief.get('round')}")
    answer = site.answer(frame)
    if answer.kind == "failure":
        say(f"{site.who}: {answer.fields['reason']}")
    return answer


def _watch(node: Child, done: threading.Event) -> None:
    while node.running():
        if done.wait(0.5):
            return
    done.set()
