"""The operator's side: the gateway, Flower's fleet API behind it, and the rounds, all in this process."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from florana.atomic_files import explained
from florana.errors import FederationError, InputError, RecipeError
from florana.federation.event import Event
from florana.flower.app.server_app import lead, noted
from florana.flower.app.settings import Settings
from florana.flower.deploy.audit_chain import digest_of
from florana.flower.deploy.audit_log import NAME, AuditLog
from florana.flower.deploy.fleet import logged_to, make_link
from florana.flower.deploy.gateway import Door, OpenDoor, open_door
from florana.flower.deploy.keys import Certificates, read_certificate
from florana.flower.deploy.live_roster import LiveRoster
from florana.flower.deploy.roster import read_roster
from florana.recipe import schema as r
from florana.runs.rounds import Show
from florana.runs.run_folder import check_folder, held, locked


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
        recipe: of the run.
        files: the operator's folder, with certificates and roster.
        folder: the run folder.
        settings: deadline, wait and base.
        host: the address to listen on.
        port: the one port that the network sees.
        resume: continue the run in the folder.
        limit: bytes of one answer of a site.
        show: told of what happens.
        opened: given the open door, before anybody is asked.

    Raises:
        FederationError: a port or a folder in use, too few clients, a disk that refuses.
        InputError: certificates or roster that are missing or out of date, a model or data that cannot be read.
        RecipeError: the folder belongs to another run, or the strategy needs what the server does not have.
    """
    check_folder(recipe, folder, resume)
    check_certificates(files)
    roster = read_roster(files.roster)
    approved = roster.keys
    if len(approved) < recipe.federation.min_clients:
        raise RecipeError(
            f"{len(approved)} sites are approved, and federation.min_clients is {recipe.federation.min_clients}",
            fix="approve the sites' .pub files with 'florana flower approve'",
        )
    work = files.folder / "flower"
    with explained(files.folder, "the operator's folder could not be written", "serve again"):
        work.mkdir(parents=True, exist_ok=True)
        work.chmod(0o700)
    own = replace(settings, out=str(folder), roster=str(files.roster), resume=resume)
    taken = FederationError(
        f"another florana serves from {files.folder}", fix="wait for it, or make a folder of its own"
    )
    with held(work / "guard", taken), logged_to(work / "link.log"):
        link, fleet = make_link(approved)
        door = Door(fleet, limit, LiveRoster(files.roster, roster), lambda: link.asked)
        inside = open_door(door, host, port, files.certificate, files.key)
        try:
            with explained(folder, "the run folder could not be made"):
                folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                opened(inside)
                audit, asked = AuditLog(files.folder / NAME), digest_of(recipe.to_toml().encode())
                audit.add("serving", run=folder.name, recipe=asked, sites=sorted(approved), roster=roster.number)
                told = noted(folder, audit.shown(show))
                if resume and not (folder / "rounds.jsonl").exists():
                    told(
                        Event("repaired", 0, detail=f"{folder} holds no committed round: the run begins with the first")
                    )
                try:
                    lead(link, recipe, own, folder, told, audit.add)
                except BaseException as error:  # Ctrl-C and a bug are ends too
                    audit.add("stopped", run=folder.name, detail=getattr(error, "what", type(error).__name__))
                    raise
                audit.add("done", run=folder.name)
        finally:
            inside.close()


def check_certificates(files: Certificates) -> None:
    """Raise InputError where the operator's certificates are missing or out of date."""
    if not files.certificate.exists():
        raise InputError(
            f"{files.folder} holds no server certificate",
            fix=f"make it with 'florana flower keys --server HOST --out {files.folder}'",
        )
    renewed = f"'florana flower renew {files.folder}'"
    for path, fix in ((files.authority, "make a new federation and new invitations"), (files.certificate, renewed)):
        certificate, now = read_certificate(path), datetime.now(UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise InputError(
                f"{path} is valid from {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}",
                why=f"it is {now:%Y-%m-%d %H:%M} UTC",
                fix=f"set the clock right, or {fix}",
            )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
    except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
        raise InputError(
            f"{files.key} is not the key of {files.certificate}", why=str(error), fix=f"make both anew: {renewed}"
        ) from None
