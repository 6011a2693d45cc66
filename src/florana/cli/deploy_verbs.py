"""The verbs of a federation over the network: keys, approve, invite, export, serve, join, doctor."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florana.cli.say import say
from florana.cli.verb import Verb
from florana.displayable import displayable
from florana.errors import InputError, RecipeError
from florana.flower import require_flwr

if TYPE_CHECKING:
    from collections.abc import Iterable

    from florana.federation.loop import Event
    from florana.flower.deploy.doctor import Finding

flower = typer.Typer(help="A federation over the network, on Flower: keys, approval, invitations, apps.")

Fed = Annotated[Path, typer.Option(help="The operator's folder, with certificates and roster.")]
Assign = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


@flower.command(cls=Verb)
def keys(
    name: Annotated[str, typer.Argument(help="The site's name, or with --server the host's name or address.")],
    out: Annotated[Path, typer.Option(help="The folder to write into.")],
    server: Annotated[bool, typer.Option("--server", help="Make the operator's certificates.")] = False,
    also: Annotated[list[str] | None, typer.Option(help="Another name or address of the host; repeatable.")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificates are valid.")] = 365,
) -> None:
    """Make a site's key pair, or with --server the operator's TLS certificates.

    Example: florana flower keys hospital-a --out site
    """
    require_flwr()
    from florana.flower.deploy.keys import make_server, make_site

    if server:
        files = make_server(out, [name, *(also or [])], days)
        say(f"certificates for {name}: {files.folder} (ca.key and server.key stay here)")
        return
    private, public = make_site(out, name)
    say(f"private key: {private} (stays here)\npublic key:  {public} (send it to the operator)")


@flower.command(cls=Verb)
def approve(
    fed: Annotated[Path, typer.Argument(help="The operator's folder.")],
    public: Annotated[list[Path], typer.Argument(help="The sites' .pub files.")],
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COUNT", help="How many training rows a site has; it counts with no others."),
    ] = None,
) -> None:
    """Let sites in: put their public keys on the roster.

    Example: florana flower approve fed hospital-a.pub hospital-b.pub --rows hospital-a=5400
    """
    require_flwr()
    from florana.flower.deploy.keys import Certificates, read_public
    from florana.flower.deploy.keys import approve as put

    counts = dict(_count(text) for text in rows or [])
    names = {path: read_public(path)[0] for path in public}
    for name in counts.keys() - names.values():
        raise RecipeError(f"--rows names '{name}', whose .pub file is not given", fix="name its file too")
    for path, name in names.items():
        put(Certificates(fed), path, counts.get(name))
        say(f"approved: {name}" + (f", {counts[name]} training rows" if name in counts else ""))


def _count(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    if not name or not (count.isascii() and count.isdecimal()) or not 1 <= int(count[:12]) <= 1_000_000_000:
        raise RecipeError(f"--rows {text!r} is not NAME=COUNT", fix="for example --rows hospital-a=5400")
    return name, int(count)


@flower.command(cls=Verb)
def invite(
    recipe: Annotated[Path, typer.Argument(help="The recipe of the run.")],
    out: Annotated[Path, typer.Option(help="A new folder for the invitation.")],
    fed: Fed = Path("fed"),
    host: Annotated[str | None, typer.Option(help="The server, as the sites reach it.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that sites connect to.")] = 8443,
    no_base: Annotated[bool, typer.Option("--no-base", help="The operator has no base model to compare with.")] = False,
) -> None:
    """Write the folder that every site gets: address, authority, recipe, and the base model's digest.

    Example: florana flower invite recipe.toml --fed fed --out invitation
    """
    require_flwr()
    from florana.flower.deploy.invitation import hosts_of
    from florana.flower.deploy.invitation import invite as write
    from florana.flower.deploy.keys import Certificates, read_certificate
    from florana.recipe.load import read_recipe

    files = Certificates(fed)
    base = ""
    if not no_base:
        from florana.flower.app.site import base_digest
        from florana.runs.setup import prepare

        resolved = read_recipe(recipe)
        base = base_digest(prepare(resolved, {} if resolved.partition.kind == "sites" else None))
    where = host or hosts_of(read_certificate(files.certificate))[0]
    write(recipe, files, where, port, out, base)
    say(f"invitation: {out} (send the whole folder to every site; nothing in it is secret)")


@flower.command(cls=Verb)
def export(
    out: Annotated[Path, typer.Argument(help="A new folder for the app.")],
    recipe: Annotated[Path, typer.Option(help="The recipe that the app runs.")],
    assign: Assign = None,
) -> None:
    """Write a Flower app that runs a recipe with 'flwr run', in a simulation or on a SuperLink of your own.

    Example: florana flower export app --recipe recipes/sst2-minilm.toml
    """
    require_flwr()
    from florana.flower.app.export import export as write
    from florana.recipe.load import read_recipe

    resolved = read_recipe(recipe, assign or [])
    write(resolved, out)
    nodes = resolved.partition.clients or 2
    say(f"app: {out}\nrun it: flwr run {out} --stream --federation-config 'num-supernodes={nodes}'")


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
    assign: Assign = None,
) -> None:
    """Run a recipe with the approved sites, over TLS, until it is done.

    Example: florana serve recipe.toml --fed fed --out runs/first
    """
    require_flwr()
    from florana.cli.console import console_of
    from florana.cli.display import Screen, summary_table
    from florana.flower.app.settings import Settings
    from florana.flower.deploy.keys import Certificates
    from florana.flower.deploy.serve import serve as lead
    from florana.recipe.load import read_recipe
    from florana.report.page import write_report
    from florana.report.views import summary, views

    resolved = read_recipe(recipe, assign or [])
    folder = out or Path("runs") / recipe.stem
    settings = Settings(resume=resume, deadline=deadline, wait=wait, base=not no_base)
    console = console_of(False)
    _end_on_signal()
    with Screen(console, resolved.strategy["name"], steps=resolved.federation.rounds) as screen:

        def show(event: Event) -> None:
            screen.show(event)
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
    assign: Assign = None,
) -> None:
    """Take part with this site's data until stopped (Ctrl-C). The data stay here.

    Example: florana join invitation --site site --data rows.csv
    """
    require_flwr()
    from florana.flower.deploy.invitation import read_invitation, site_recipe
    from florana.flower.deploy.join import join as take_part

    read = read_invitation(invitation)
    recipe = site_recipe(read, base, test, assign or [])
    done = _end_on_signal()
    take_part(recipe, read, site, data, done=done, say=lambda text: say(displayable(text)))


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
