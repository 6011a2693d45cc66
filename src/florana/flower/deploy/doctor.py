"""Everything that could stop a federation, looked at before anything starts: what is wrong, and what to do."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from florana.errors import FederationError, FloranaError
from florana.flower.app.site import base_digest
from florana.flower.deploy.invitation import Invitation
from florana.flower.deploy.join import prepare_site
from florana.flower.deploy.keys import Certificates, read_certificate, read_private
from florana.flower.deploy.reachability import clock_difference, in_words
from florana.flower.deploy.roster import read_roster
from florana.flower.deploy.serve import check_certificates
from florana.recipe import schema as r
from florana.runs.prepared import Setup, prepare
from florana.runs.threads import instructions

CLOCK_SECONDS = 60.0
"""Flower takes signatures that are at most 300 seconds old; a clock that is off by more than this will soon be."""
SPARE_DISK = 2**30
SOON = timedelta(days=30)
"""A certificate that ends within this is to be renewed."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: the name of the check.
        fine: whether it is as it should be.
        said: what was found.
        fix: what to do where it is not.
    """

    what: str
    fine: bool
    said: str
    fix: str = ""


def at_site(invitation: Invitation, recipe: r.Recipe, keys: Path, data: Path | None) -> Iterator[Finding]:
    """The findings at a site, each as soon as it is there."""
    yield from _common(keys, recipe)
    yield _tried("key", lambda: f"{read_private(keys)[0]}, readable by its owner alone")
    yield Finding("the server's code", True, "is neither fetched nor run at this site")
    yield from _server(invitation)
    setup: list[Setup] = []

    def load() -> str:
        who = read_private(keys)[0]
        setup.append(prepare_site(recipe, who, data))
        holds = setup[0].partition["clients"][who]
        return f"{holds['train']} rows to train on, {holds['test']} to test on"

    yield _tried("data and model", load)
    if setup:
        yield _base(setup[0], invitation.base)
        yield _memory(setup[0])


def at_server(
    recipe: r.Recipe, files: Certificates, out: Path, host: str, port: int, *, base: bool
) -> Iterator[Finding]:
    """The findings at the operator's machine."""
    yield from _common(out, recipe)

    def valid() -> str:
        check_certificates(files)
        end = read_certificate(files.certificate).not_valid_after_utc
        if end - datetime.now(UTC) < SOON:
            raise FloranaError(
                f"the server's is valid until {end:%Y-%m-%d}", fix=f"'florana flower renew {files.folder}'"
            )
        return f"the server's until {end:%Y-%m-%d}"

    def sites() -> str:
        names = sorted(read_roster(files.roster).keys)
        if len(names) < recipe.federation.min_clients:
            raise FloranaError(
                f"{len(names)} approved, federation.min_clients is {recipe.federation.min_clients}",
                fix="'florana flower approve' the sites' .pub files",
            )
        return ", ".join(names)

    yield _tried("certificates", valid)
    yield _tried("approved sites", sites)
    yield _port(host, port)
    if base:
        setup: list[Setup] = []

        def load() -> str:
            setup.append(prepare(recipe, {} if recipe.partition.kind == "sites" else None))
            return f"{len(setup[0].common)} common test rows; base model {base_digest(setup[0])[:12]}"

        yield _tried("data and model", load)
        if setup:
            yield _memory(setup[0])


def _common(folder: Path, recipe: r.Recipe) -> Iterator[Finding]:
    names = ["florana", "flwr", "torch", "transformers", "peft"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield Finding("versions", True, f"Python {sys.version.split()[0]}, {versions}")
    count, whose = recipe.threads or torch.get_num_threads(), "the recipe's" if recipe.threads else "this process's own"
    yield Finding("threads", True, f"{count}, {whose}, on a processor with {instructions()}")
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    yield Finding(
        "disk",
        writable and free > SPARE_DISK,
        f"{free / 2**30:.1f} GiB free" if writable else f"{place} cannot be written",
        "" if writable and free > SPARE_DISK else "free some space, or choose another folder",
    )


def _server(invitation: Invitation) -> Iterator[Finding]:
    name = f"server {invitation.address}"
    try:
        off = clock_difference(invitation)
    except FederationError as error:
        yield Finding(name, False, f"{error.what}: {error.why}", error.fix)
        return
    except OSError as error:
        fix = "is it started ('florana serve')? does a firewall forbid it?"
        yield Finding(name, False, f"not reached ({error.strerror or type(error).__name__})", fix)
        return
    yield Finding(name, True, "reached, and its certificate is the invitation's")
    fine = abs(off) <= CLOCK_SECONDS
    fix = "" if fine else "set this machine's clock right"
    yield Finding("clock", fine, in_words(off), fix)


def _base(setup: Setup, expected: str) -> Finding:
    own = base_digest(setup)
    if not expected:
        return Finding("base model", True, f"digest {own[:12]}; all sites must show the same")
    if own == expected:
        return Finding("base model", True, f"digest {own[:12]}, the operator's")
    return Finding(
        "base model",
        False,
        f"digest {own[:12]}, the operator's is {expected[:12]}",
        "take the same files, and the same model.dtype and quantization",
    )


def _memory(setup: Setup) -> Finding:
    """What training will need beside what is loaded: gradients and two moments of what is trained."""
    need = 4 * 4 * setup.start.parameters + 2**28
    free = available_memory()
    return Finding(
        "memory",
        free > need,
        f"{free / 2**30:.1f} GiB left with the model loaded, at least {need / 2**30:.1f} are needed",
        "" if free > need else "a smaller train.batch_size, model.dtype = 'bfloat16', or a machine with more",
    )


def available_memory() -> int:
    """Bytes of memory that new work can have on this machine."""
    table = Path("/proc/meminfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _port(host: str, port: int) -> Finding:
    try:
        with socket.create_server((host, port)):
            return Finding(f"port {port}", True, "free")
    except OSError as error:
        return Finding(f"port {port}", False, error.strerror or str(error), "choose another --port")


def _tried(what: str, attempt: Callable[[], Any]) -> Finding:
    try:
        return Finding(what, True, str(attempt()))
    except FloranaError as error:
        return Finding(what, False, " ".join(part for part in (error.what, error.why) if part), error.fix)
