"""A site's side: the model and the rows, and a line to the server that asks for the training of a round."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from florana.atomic_files import explained
from florana.errors import FederationError, FloranaError, InputError
from florana.federation.client_state import recall
from florana.flower.app.codec import failure_frame
from florana.flower.app.farewell import ENDED
from florana.flower.app.flower_engine import size_and_digest
from florana.flower.app.frames import Frame
from florana.flower.app.site import Site, site_of
from florana.flower.app.site_card import digest
from florana.flower.deploy.audit_log import NAME, AuditLog
from florana.flower.deploy.bounded_answers import largest_request
from florana.flower.deploy.final_adapter import checked, written
from florana.flower.deploy.fleet import logged_to
from florana.flower.deploy.invitation import Invitation
from florana.flower.deploy.kept_update import remembered
from florana.flower.deploy.keys import read_private
from florana.flower.deploy.node import attend
from florana.flower.deploy.one_run import one_run
from florana.flower.deploy.quota import RUNS, Quota, limited
from florana.flower.deploy.site_signatures import signer_of
from florana.recipe import schema as r
from florana.recipe.usage import usage_of
from florana.runs.prepared import Setup, prepare
from florana.runs.run_folder import held


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
    stay: bool = False,
    counts: bool = False,
    most: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    step: Callable[[str], None] = lambda client: None,
) -> None:
    """Take part until the run has ended, or `done` is set.

    Args:
        recipe: `invitation.site_recipe`.
        invitation: the operator's.
        keys: the site's folder, with its private key; the client state is written below it.
        data: this site's rows; None where the recipe deals out one data set to all.
        done: set by whoever wants to leave.
        stay: answer any run, and go on waiting after one has ended; else one run, the first that it works for.
        counts: tell the server how many rows of each class there are here, and not only how many.
        most: trainings within 24 hours; None for ten times the recipe's rounds.
        say: told of what happens.
        step: told of every optimizer step.

    Raises:
        InputError: key, model or data cannot be used.
        FederationError: the server refuses this site, or another florana takes part with the same folder.
    """
    who, key = read_private(keys)
    work = keys / "flower"
    taken = FederationError(f"another florana takes part from {keys}", fix="wait for it, or end it")
    with explained(keys, "the site's folder could not be written", "join again"):
        for folder in (work, keys / "kept"):  # for this account alone
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
    with held(work / "lock", taken), logged_to(work / "node.log"):
        setup = prepare_site(recipe, who, data)
        signer = signer_of(invitation, who, key) if recipe.privacy.secure_aggregation else None
        site = site_of(recipe, setup, who, keys / "kept", step, counts, signer)
        quota = Quota(keys / "kept" / "trained.json", most or RUNS * recipe.federation.rounds)
        site = replace(site, fit=limited(site.fit, quota))
        if data is None:
            say(f"{who}: trains on its share of what the recipe names: {recipe.data.train}")
        say(f"{who}: {site.card.introduced(None)}; connecting to {invitation.address}")

        def end(frame: Frame) -> Frame:
            """The server's last word: the adapter is written down, where it sent one."""
            run, rounds = str(frame.fields.get("run")), _round_of(frame)
            say(f"{who}: the federation has ended after {rounds} rounds")
            if frame.payload:
                adapter = checked(frame, site.start, recall(site.folder, run, who, rounds + 1))
                labels = setup.partition.get("labels", ())
                say(f"{who}: adapter: {written(adapter, setup.bench.card, usage_of(recipe, labels), keys)}")
            return Frame(ENDED)

        audit = AuditLog(keys / NAME)
        answered: Callable[[Frame], Frame] = functools.partial(
            told, site, kept=keys / "kept" / "answer", say=say, end=end
        )
        if not stay:
            answered = one_run(answered, lambda reason: say(f"{who}: {reason}"))

        def asked(frame: Frame) -> Frame:
            """The answer to a request, both written down before it is sent."""
            facts = {"kind": frame.kind, "run": str(frame.fields.get("run", "")), "round": _round_of(frame)}
            facts |= _step_of(frame)
            audit.add("asked", **{n: f for n, f in facts.items() if f}, **size_and_digest(frame.payload))
            made = answered(frame)
            why = str(made.fields.get("reason", ""))
            facts = {"reason": why} if why else {}
            if site.spent is not None and frame.kind == site.charged:
                facts |= {"epsilon": f"{site.spent():.4f}"}
            audit.add("answered", kind=made.kind, **facts, **size_and_digest(made.payload))
            return made

        audit.add("joining", site=who, server=invitation.address, rows=len(setup.clients[who].train))
        ends = frozenset() if stay else frozenset({ENDED})
        attend(invitation, key, asked, done, say, ends, largest_request(site.start))
        audit.add("left", site=who)


def _step_of(frame: Frame) -> dict[str, object]:
    """Of a secure sum, which step is asked for; never what it brings."""
    step = frame.fields.get("step")
    if frame.kind != "sealed" or not isinstance(step, dict):
        return {}
    name, trip = str(step.get("step"))[:20], step.get("trip")
    return {"step": name} | ({"trip": trip + 1} if type(trip) is int else {})


def _round_of(frame: Frame) -> int:
    brief = frame.fields.get("brief")
    round_ = brief.get("round") if isinstance(brief, dict) else frame.fields.get("rounds")
    return round_ if isinstance(round_, int) else 0


def told(
    site: Site,
    frame: Frame,
    kept: Path,
    say: Callable[[str], None],
    end: Callable[[Frame], Frame] = lambda frame: frame,
) -> Frame:
    """The site's answer to a request: the one in the file `kept`, where it was made for just this request; `end` takes
    the run's last one."""
    if frame.kind == ENDED:
        try:
            return end(frame)
        except FloranaError as error:
            reason = str(error).replace("\n", "; ")
        say(f"{site.who}: {reason}")
        return failure_frame(reason)
    brief = frame.fields.get("brief")
    if isinstance(brief, dict):
        trip = brief.get("trip")
        again = f", trip {trip + 1}" if type(trip) is int and 0 < trip < 10 else ""  # each has its own answer
        say(f"{site.who}: round {brief.get('round')}{again}")
        kept = kept.with_name(kept.name + again.replace(", trip ", "-"))
    as_it_was = frame.fields.get("card") == digest(site.card)
    answer = remembered(site.answer, frame, kept) if as_it_was else site.answer(frame)
    if answer.kind == "failure":
        say(f"{site.who}: {answer.fields['reason']}")
    return answer
