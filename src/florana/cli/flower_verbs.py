"""The verbs below `flower`, around a federation: keys, approve, revoke, invite, audit, export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florana.cli.say import say
from florana.cli.verb import Verb
from florana.displayable import displayable
from florana.errors import RecipeError
from florana.flower import require_flwr

if TYPE_CHECKING:
    pass

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
    from florana.flower.deploy.audit_chain import digest_of
    from florana.flower.deploy.audit_log import NAME, AuditLog
    from florana.flower.deploy.keys import Certificates, read_public
    from florana.flower.deploy.roster import approve as put

    counts = dict(_count(text) for text in rows or [])
    names = {path: read_public(path)[0] for path in public}
    for name in counts.keys() - names.values():
        raise RecipeError(f"--rows names '{name}', whose .pub file is not given", fix="name its file too")
    for path, name in names.items():
        put(Certificates(fed), path, counts.get(name))
        facts = {"rows": counts[name]} if name in counts else {}
        AuditLog(fed / NAME).add("approved", site=name, key=digest_of(path.read_bytes()), **facts)
        say(f"approved: {name}" + (f", {counts[name]} training rows" if name in counts else ""))


@flower.command(cls=Verb)
def revoke(
    fed: Annotated[Path, typer.Argument(help="The operator's folder.")],
    names: Annotated[list[str], typer.Argument(help="The sites' names.")],
) -> None:
    """Take sites off the roster: a server that is running refuses their next request.

    A site with a new key is revoked, and its new .pub file approved.

    Example: florana flower revoke fed hospital-b
    """
    require_flwr()
    from florana.flower.deploy.audit_log import NAME, AuditLog
    from florana.flower.deploy.keys import Certificates
    from florana.flower.deploy.roster import revoke as take

    for name in dict.fromkeys(names):
        take(Certificates(fed), name)
        AuditLog(fed / NAME).add("revoked", site=name)
        say(f"revoked: {name}")


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
        from florana.runs.prepared import prepare

        resolved = read_recipe(recipe)
        base = base_digest(prepare(resolved, {} if resolved.partition.kind == "sites" else None))
    where = host or hosts_of(read_certificate(files.certificate))[0]
    write(recipe, files, where, port, out, base)
    say(f"invitation: {out} (send the whole folder to every site; nothing in it is secret)")


@flower.command(cls=Verb)
def audit(
    place: Annotated[Path, typer.Argument(help="The folder of an operator or a site, or a log.")],
    head: Annotated[
        str | None, typer.Option(help="A digest that must be in the log, as it was noted elsewhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that nothing in an audit log was changed, and print it.

    Example: florana flower audit site
    """
    require_flwr()
    from florana.flower.deploy.audit_log import read_log

    entries, torn = read_log(place, head)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    for entry in entries:
        facts = "  ".join(f"{name} {fact}" for name, fact in entry.facts.items() if name != "before")
        say(displayable(f"{entry.number:>5}  {entry.time}  {entry.event:<10} {facts}"))
    if torn:
        say("the last line was cut off: the next entry will close it")
    last = entries[-1].digest if entries else "-"
    say(f"{len(entries)} entries, each holds the digest of the one before it")
    say(f"head: {last} (note it elsewhere: lines cut off at the end are seen by it alone)")


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
