"""The operator's side: a SuperLink on this machine alone, the door before it, the run in it, and an end to all of it.

Flower ends a run as failed when its SuperLink dies. The run folder does not: `resume` submits the run again, and it
goes on from the last committed round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from florana import recipe as r
from florana.conduct import Show
from florana.errors import FederationError, FloranaError, InputError, RecipeError
from florana.federation.journal import read_records
from florana.federation.loop import Event
from florana.flower.export import export
from florana.flower.front import Door, OpenDoor, open_door, trusting
from florana.flower.keys import Certificates, openssh, read_certificate, read_roster
from florana.flower.processes import Child, call, free_port, start, until
from florana.flower.settings import Settings, beside
from florana.run_folder import OUTCOME, PROGRESS, check_folder, held, is_free
from florana.whole_files import explained

POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
_ANSWERS = 60.0
_STARTS = 180.0


@dataclass(frozen=True, eq=False)
class SuperLink:
    """A running SuperLink: its process, its address on this machine, and the environment of Flower's own commands."""

    child: Child
    address: str
    environment: dict[str, str]


def serve(
    recipe: r.Recipe,
    files: Certificates,
    folder: Path,
    settings: Settings,
    *,
    host: str = "0.0.0.0",
    port: int = 8443,
    resume: bool = False,
    limit: int = 2**28,
    show: Show = lambda event: None,
    opened: Callable[[OpenDoor], None] = lambda door: None,
) -> None:
    """Serve one run to the approved sites, until it ends.

    Args:
        files: the operator's folder, with certificates and roster. folder: the run folder.
        limit: bytes of one answer of a site.
        show: told of what happens. opened: given the open door, before anything is submitted.

    Raises:
        FloranaError: what the run itself could not do, with its own exit code.
        FederationError: a port in use, or a Flower program that does not start or ends early.
        InputError: certificates or roster that are missing or out of date.
    """
    check_folder(recipe, folder, resume)
    approved = read_roster(files.roster)
    check_certificates(files)
    if len(approved) < recipe.federation.min_clients:
        raise RecipeError(
            f"{len(approved)} sites are approved, and federation.min_clients is {recipe.federation.min_clients}",
            fix="approve the sites' .pub files with 'florana flower approve'",
        )
    work = files.folder / "flower"
    with explained(files.folder, "the operator's folder could not be written"):
        work.mkdir(parents=True, exist_ok=True)
        work.chmod(0o700)
    (folder / OUTCOME).unlink(missing_ok=True)
    guard = work / "guard"
    own = replace(settings, out=str(folder.resolve()), roster=str(files.roster.resolve()), guard=str(guard.resolve()))
    taken = FederationError(
        f"another florana serves from {files.folder}", fix="wait for it, or make a folder of its own"
    )
    with held(guard, taken, 5.0), superlink(files, work) as link:
        _register(link, approved, work)
        door = Door(f"https://{link.address}", limit, trusting(files.authority))
        inside = open_door(door, host, port, files.certificate, files.key)
        try:
            opened(inside)
            app = _app(recipe, own, work)
            call(["flwr", "run", str(app), "florana", "--format", "json"], link.environment)
            _follow(link.child, folder, beside(guard), show)
        finally:
            inside.close()


@contextmanager
def superlink(files: Certificates, work: Path) -> Iterator[SuperLink]:
    """A SuperLink on this machine alone, with the nodes' keys checked; ended with everything it started."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    home = work / "home"
    home.mkdir(exist_ok=True)
    connection = f'[superlink.florana]\naddress = "{address}"\nroot-certificates = "{files.authority.resolve()}"\n'
    (home / "config.toml").write_text('[superlink]\ndefault = "florana"\n\n' + connection, encoding="utf-8")
    environment = {"FLWR_HOME": str(home.resolve()), **POLL}
    child = start(
        [
            "flower-superlink",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--ssl-ca-certfile={files.authority.resolve()}",
            f"--ssl-certfile={files.certificate.resolve()}",
            f"--ssl-keyfile={files.key.resolve()}",
            "--enable-supernode-auth",
            f"--database={(work / 'state.db').resolve()}",
            "--disable-runtime-dependency-installation",
        ],
        work / "superlink.log",
        environment,
    )
    try:
        if not until(lambda: not child.running() or _answers(address, files), _ANSWERS) or not child.running():
            raise FederationError("Flower's SuperLink did not start", why=child.tail())
        yield SuperLink(child, address, environment)
    finally:
        child.end()


def check_certificates(files: Certificates) -> None:
    """Raise InputError where the operator's certificates are missing or out of date."""
    if not files.certificate.exists():
        raise InputError(
            f"{files.folder} holds no server certificate",
            fix=f"make it with 'florana flower keys --server HOST --out {files.folder}'",
        )
    for path in (files.authority, files.certificate):
        certificate, now = read_certificate(path), datetime.now(UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise InputError(
                f"{path} is valid from {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}",
                why=f"it is {now:%Y-%m-%d %H:%M} UTC",
                fix="set the clock right, or make new certificates and invitations",
            )


def _register(link: SuperLink, approved: dict[str, bytes], work: Path) -> None:
    """Tell the SuperLink the approved keys that it does not know yet."""
    known = work / "registered.json"
    done: dict[str, str] = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    for name, pem in approved.items():
        if done.get(name) == pem.decode():
            continue
        public = work / f"{name}.pub"
        public.write_bytes(openssh(pem))
        call(["flwr", "supernode", "register", str(public), "florana"], link.environment)
        done[name] = pem.decode()
        known.write_text(json.dumps(done, indent=1), encoding="utf-8")


def _app(recipe: r.Recipe, settings: Settings, work: Path) -> Path:
    """The app of this start, in a folder of its own."""
    number = len(list(work.glob("app-*"))) + 1
    return export(recipe, work / f"app-{number:04d}", settings)


def _answers(address: str, files: Certificates) -> bool:
    try:
        httpx.post(f"https://{address}/", verify=trusting(files.authority), timeout=2.0)
    except httpx.HTTPError:
        return False
    return True


def _follow(link: Child, folder: Path, alive: Path, show: Show) -> None:
    """Show the run's events until it has an outcome; raise what it ended with.

    Args:
        alive: what the run keeps locked while it lives: killed, it leaves no outcome behind.
    """
    outcome, progress = folder / OUTCOME, folder / PROGRESS
    lived = False
    seen, begun = progress.stat().st_size if progress.exists() else 0, time.monotonic()

    def told(seen: int) -> int:
        seen, events = _events(progress, seen)
        for event in events:
            if event.kind == "committed":
                records = {record.round: record for record in read_records(folder / "rounds.jsonl")}
                event = replace(event, record=records.get(event.round))
            show(event)
        return seen

    while not outcome.exists():
        seen = told(seen)
        if not link.running():
            raise FederationError(
                "Flower's SuperLink ended in the middle of the run",
                why=link.tail(),
                fix="the committed rounds stand: start again with --resume",
            )
        gone = is_free(alive)
        if gone and lived and not outcome.exists():
            raise FederationError(
                "the server's part of the run was killed",
                why=link.tail(),
                fix="the committed rounds stand: start again with --resume",
            )
        lived = lived or not gone
        if not lived and time.monotonic() - begun > _STARTS:
            raise FederationError("the server's part of the run did not start", why=link.tail())
        time.sleep(0.1)
    told(seen)
    ended: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
    if ended["exit_code"]:
        error = FloranaError(ended["what"], why=ended["why"], fix=ended["fix"])
        error.exit_code = int(ended["exit_code"])
        raise error


def _events(path: Path, seen: int) -> tuple[int, list[Event]]:
    if not path.exists():
        return seen, []
    with path.open("rb") as stream:
        stream.seek(seen)
        new = stream.read()
    whole = new[: new.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    return seen + len(whole), [Event(e["kind"], e["round"], e["client"], e["detail"]) for e in lines]
