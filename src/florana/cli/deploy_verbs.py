"""The verbs of a federation over the network: serve, join, doctor."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florana.cli.say import say
from florana.cli.track_option import Track, note, trackers
from florana.displayable import displayable
from florana.errors import InputError, RecipeError
from florana.flower import require_flwr

if TYPE_CHECKING:
    from collections.abc import Iterable

    from florana.federation.event import Event
    from florana.flower.deploy.doctor import Finding

OURS_ALONE = 0o077
"""The umask of a federation's programs: what they write, run folders and adapters too, is for this account alone."""

Fed = Annotated[Path, typer.Option(help="The operator's folder, with certificates and roster.")]
Assign = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def serve(
    recipe: Annotated[Path, typer.Argument(help="The recipe of the run, as it was sent to the sites.")],
    fed: Fed = Path("fed"),
    out: Annotated[Path | None, typer.Option(help="A new folder for the run. Default: runs/<recipe's name>.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one port that sites connect to.")] = 8443,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds a round waits for its last answer.")] = 3600,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for the sites at the start.")] = 600,
    limit: Annotated[int, typer.Option(min=1, help="MiB that one answer of a site may have.")] = 256,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Do without the base model here: nothing is measured at the server.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")] = False,
    track: Track = None,
    assign: Assign = None,
) -> None:
    """Run a recipe with the approved sites, over TLS, until it is done.

    Example: florana serve recipe.toml --fed fed --out runs/first
    """
    require_flwr()
    os.umask(OURS_ALONE)
    from florana.cli.console import console_of
    from florana.cli.display import Screen, summary_table
    from florana.flower.app.settings import Settings
    from florana.flower.deploy.keys import Certificates
    from florana.flower.deploy.serve import serve as lead
    from florana.recipe.load import read_recipe
    from florana.report.page import write_report
    from florana.report.views import summary, views
    from florana.strategy.custom import plain_name
    from florana.track.tracking import tracked

    names = trackers(track)
    resolved = read_recipe(recipe, assign or [])
    folder = out or Path("runs") / recipe.stem
    settings = Settings(resume=resume, deadline=deadline, wait=wait, base=not no_base)
    console = console_of(False)
    _end_on_signal()
    with (
        Screen(console, plain_name(resolved.strategy["name"]), steps=resolved.federation.rounds) as screen,
        tracked(folder, names, screen.show, note) as follow,
    ):

        def show(event: Event) -> None:
            follow(event)
            if event.kind == "committed":
                screen.step("")

        lead(
            resolved,
            Certificates(fed),
            folder,
            settings,
            host=host,
            port=port,
            resume=resume,
            limit=limit * 2**20,
            show=show,
            opened=lambda door: say(f"gateway: listening on port {port}: sites can join", err=True),
        )
    report = write_report([folder], folder / "report.html")
    if console:
        console.print(summary_table(summary(views([folder])), resolved.title or recipe.stem, console.width))
        say(f"run: {folder}\nadapter: {folder / 'adapter'}\nreport: {report}")


def join(
    invitation: Annotated[Path, typer.Argument(help="The operator's invitation folder.")],
    site: Annotated[Path, typer.Option(help="This site's folder, with its private key.")] = Path("site"),
    data: Annotated[Path | None, typer.Option(help="This site's rows.")] = None,
    base: Annotated[str | None, typer.Option(help="Where this site has the base model.")] = None,
    test: Annotated[Path | None, typer.Option(help="A common test set, where the operator gave one.")] = None,
    stay: Annotated[
        bool,
        typer.Option("--stay", help="Answer any run, and wait for the next one when one has ended. Default: one run."),
    ] = False,
    class_counts: Annotated[
        bool, typer.Option("--class-counts", help="Tell the server how many rows of each class are here.")
    ] = False,
    trainings_a_day: Annotated[
        int | None,
        typer.Option(
            min=1, help="How often to train within 24 hours at most.; ten times the recipe's rounds without it."
        ),
    ] = None,
    assign: Assign = None,
) -> None:
    """Take part with this site's data until the run has ended; the data stay here, and the final adapter comes here.

    Example: florana join invitation --site site --data rows.csv
    """
    require_flwr()
    os.umask(OURS_ALONE)
    from florana.flower.deploy.invitation import read_invitation, site_recipe
    from florana.flower.deploy.join import join as take_part

    read = read_invitation(invitation)
    recipe = site_recipe(read, base, test, assign or [])
    done = _end_on_signal()
    take_part(
        recipe,
        read,
        site,
        data,
        done=done,
        stay=stay,
        counts=class_counts,
        most=trainings_a_day,
        say=lambda text: say(displayable(text)),
    )


def doctor(
    place: Annotated[Path, typer.Argument(help="At a site the invitation folder; at the server the recipe.")],
    site: Annotated[Path, typer.Option(help="This site's folder, with its private key.")] = Path("site"),
    data: Annotated[Path | None, typer.Option(help="This site's rows.")] = None,
    base: Annotated[str | None, typer.Option(help="Where this site has the base model.")] = None,
    fed: Fed = Path("fed"),
    out: Annotated[Path, typer.Option(help="At the server: where runs will be written.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="At the server: the address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="At the server: the port.")] = 8443,
    no_base: Annotated[bool, typer.Option("--no-base", help="At the server: without the base model.")] = False,
    as_json: Json = False,
) -> None:
    """Look at everything that could stop a federation, before anything starts. Ends with code 3 where something would.

    Example: florana doctor invitation --site site --data rows.csv
    """
    require_flwr()
    from florana.flower.deploy.doctor import at_server, at_site
    from florana.flower.deploy.invitation import read_invitation, site_recipe
    from florana.flower.deploy.keys import Certificates
    from florana.recipe.load import read_recipe

    if place.is_dir():
        read = read_invitation(place)
        findings = at_site(read, site_recipe(read, base, None, []), site, data)
    elif place.exists():
        findings = at_server(read_recipe(place), Certificates(fed), out, host, port, base=not no_base)
    else:
        raise RecipeError(
            f"there is no {place}", fix="give the invitation folder (at a site) or the recipe (at the server)"
        )
    _print(findings, as_json)


def _print(findings: Iterable[Finding], as_json: bool) -> None:
    every = []
    for finding in findings:
        every.append(finding)
        if not as_json:
            typer.secho("ok   " if finding.fine else "BAD  ", fg="green" if finding.fine else "red", nl=False)
            say(
                f"{displayable(finding.what)}: {displayable(finding.said)}"
                + (f"\n     fix: {displayable(finding.fix)}" if finding.fix else "")
            )
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in every], indent=1))
    bad = [finding.what for finding in every if not finding.fine]
    if bad:
        raise InputError(f"{len(bad)} of {len(every)} findings would stop the federation: {', '.join(bad)}")


def _end_on_signal() -> threading.Event:
    """SIGTERM ends like Ctrl-C: children are ended, nothing is left behind."""
    import signal
    from types import FrameType

    done = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        done.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    return done
