"""The verbs below `flower`, around a federation: keys, renew, approve, revoke, invite, audit, export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florana.cli.say import say
from florana.cli.verb import Verb
from florana.displayable import displayable
from florana.errors import InputError, RecipeError
from florana.flower import require_flwr

if TYPE_CHECKING:
    from florana.flower.deploy.authority import AuthorityKey
    from florana.flower.deploy.keys import Certificates

flower = typer.Typer(help="A federation over the network, on Flower: keys, approval, invitations, apps.")

Fed = Annotated[Path, typer.Option(help="The operator's folder, with certificates and roster.")]
Assign = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
]
AuthorityFile = Annotated[
    Path | None,
    typer.Option("--authority-key", help="Where the authority's key is kept, if not in the operator's folder."),
]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="A file whose first line opens the authority's key.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


@flower.command(cls=Verb)
def keys(
    name: Annotated[str, typer.Argument(help="The site's name, or with --server the host's name or address.")],
    out: Annotated[Path, typer.Option(help="The folder to write into.")],
    server: Annotated[bool, typer.Option("--server", help="Make the operator's certificates.")] = False,
    also: Annotated[list[str] | None, typer.Option(help="Another name or address of the host; repeatable.")] = None,
    days: Annotated[
        int, typer.Option(min=1, max=36500, help="How long the server's certificate is valid; it can be renewed.")
    ] = 365,
    authority_key: AuthorityFile = None,
    passphrase_file: PassphraseFile = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Put a new key in the place of a site's own, signed by that one.")
    ] = False,
) -> None:
    """Make a site's key pair, or with --server the operator's TLS certificates.

    Example: florana flower keys hospital-a --out site
    """
    require_flwr()
    from florana.flower.deploy.authority import make_server, own_key
    from florana.flower.deploy.keys import Certificates, make_site, rotate_site

    if server:
        if rotate:
            raise RecipeError("--rotate is for a site's key", fix=f"'florana flower renew {out}' for the server's")
        kept = _authority(Certificates(out), authority_key, passphrase_file)
        files = make_server(out, [name, *(also or [])], days, authority=kept)
        place = kept or own_key(files)
        say(f"certificates for {name}: {files.folder}")
        say(f"the authority's key: {place.path} (approves sites; the server needs it only to be renewed)")
        return
    if authority_key is not None or passphrase_file is not None or also:
        raise RecipeError("--authority-key, --passphrase-file and --also are for the operator", fix="add --server")
    private, public = rotate_site(out, name) if rotate else make_site(out, name)
    say(f"private key: {private} (stays here)\npublic key:  {public} (send it to the operator)")
    if rotate:
        say(f"until the operator has approved it, the server knows the key before alone: {private}-before")


@flower.command(cls=Verb)
def renew(
    fed: Annotated[Path, typer.Argument(help="The operator's folder.")],
    days: Annotated[int, typer.Option(min=1, max=36500, help="How long the new certificate is valid.")] = 365,
    also: Annotated[list[str] | None, typer.Option(help="Another name or address of the host; repeatable.")] = None,
    authority_key: AuthorityFile = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a new key and certificate of the server, below the same authority: invitations stay as they are.

    A server that is running shows the new one from its next start on.

    Example: florana flower renew fed
    """
    require_flwr()
    from florana.flower.deploy.audit_log import NAME, AuditLog
    from florana.flower.deploy.authority import renew as renewed
    from florana.flower.deploy.keys import Certificates

    files = Certificates(fed)
    end = renewed(files, days, also or [], authority=_authority(files, authority_key, passphrase_file))
    AuditLog(fed / NAME).add("renewed", until=end.isoformat(timespec="seconds"))
    say(f"certificate: {files.certificate}, valid until {end:%Y-%m-%d}")


@flower.command(cls=Verb)
def approve(
    fed: Annotated[Path, typer.Argument(help="The operator's folder.")],
    public: Annotated[list[Path], typer.Argument(help="The sites' .pub files.")],
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COUNT", help="How many training rows a site has; it counts with no others."),
    ] = None,
    authority_key: AuthorityFile = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Let sites in: put their public keys on the roster, which the authority's key signs.

    A site's new key takes the place of the one before where that one has signed it ('keys --rotate').

    Example: florana flower approve fed hospital-a.pub hospital-b.pub --rows hospital-a=5400
    """
    require_flwr()
    from florana.flower.deploy.audit_chain import digest_of
    from florana.flower.deploy.audit_log import NAME, AuditLog
    from florana.flower.deploy.keys import Certificates, read_public
    from florana.flower.deploy.roster import approve as put

    counts = dict(_count(text) for text in rows or [])
    files = Certificates(fed)
    authority = _authority(files, authority_key, passphrase_file)
    names = {path: read_public(path).name for path in public}
    for name in counts.keys() - names.values():
        raise RecipeError(f"--rows names '{name}', whose .pub file is not given", fix="name its file too")
    for path, name in names.items():
        _, rotated = put(files, path, counts.get(name), authority)
        facts = {"rows": counts[name]} if name in counts else {}
        event = "rotated" if rotated else "approved"
        AuditLog(fed / NAME).add(event, site=name, key=digest_of(path.read_bytes()), **facts)
        own = ", with a new key in the place of the one before" if rotated else ""
        say(f"approved: {name}{own}" + (f", {counts[name]} training rows" if name in counts else ""))


@flower.command(cls=Verb)
def revoke(
    fed: Annotated[Path, typer.Argument(help="The operator's folder.")],
    names: Annotated[list[str], typer.Argument(help="The sites' names.")],
    authority_key: AuthorityFile = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Take sites off the roster: a server that is running refuses their next request.

    A site that lost its key is revoked, and its new .pub file approved.

    Example: florana flower revoke fed hospital-b
    """
    require_flwr()
    from florana.flower.deploy.audit_log import NAME, AuditLog
    from florana.flower.deploy.keys import Certificates
    from florana.flower.deploy.roster import revoke as take

    files = Certificates(fed)
    authority = _authority(files, authority_key, passphrase_file)
    for name in dict.fromkeys(names):
        take(files, name, authority)
        AuditLog(fed / NAME).add("revoked", site=name)
        say(f"revoked: {name}")


def _authority(files: Certificates, path: Path | None, passphrase: Path | None) -> AuthorityKey | None:
    """The authority's key as the options say; None where they say nothing."""
    from florana.bounded import read_bytes
    from florana.flower.deploy.authority import AuthorityKey, own_key

    if path is None and passphrase is None:
        return None
    words = None
    if passphrase is not None:
        try:
            words = read_bytes(passphrase, 2**12).partition(b"\n")[0].rstrip(b"\r")
        except (OSError, ValueError) as error:
            raise InputError(f"{passphrase} cannot be read", why=str(error)) from None
        if not words:
            raise InputError(f"{passphrase} begins with an empty line", fix="write the passphrase into its first line")
    return AuthorityKey(path or own_key(files).path, words)


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
