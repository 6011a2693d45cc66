"""What the operator hands to every site: where the server is, what to check it by, and the recipe. Nothing secret.

INVITATION/federation.toml   address        ca.crt   the authority        recipe.toml   as the operator wrote it
           roster.json       with secure sums: the approved sites' public keys, by which each checks the others
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tomli_w
from cryptography import x509

from florana.atomic_files import replace_file
from florana.bounded import read_toml
from florana.errors import InputError, RecipeError
from florana.flower.deploy.keys import Certificates, read_certificate
from florana.flower.deploy.roster import read_roster
from florana.recipe.load import read_recipe
from florana.recipe.schema import Recipe
from florana.strategy.custom import is_own

ROSTER = "roster.json"


@dataclass(frozen=True)
class Invitation:
    """An invitation that was read: the folder, the server's host and port, the authority, the recipe, and the digest
    of the operator's base model (empty where the operator has none)."""

    folder: Path
    host: str
    port: int
    authority: Path
    recipe: Path
    base: str = ""

    @property
    def address(self) -> str:
        """`host:port`, as Flower spells it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def invite(recipe: Path, files: Certificates, host: str, port: int, folder: Path, base: str = "") -> Path:
    """Write an invitation into a new folder.

    Args:
        recipe: the recipe's file.
        files: the operator's certificates.
        host: the server, as the sites reach it.
        port: the port that the sites connect to.
        folder: a new folder.
        base: the digest of the operator's base model, by which a site finds out at once that it has another one.

    Raises:
        RecipeError: the recipe is wrong, or the folder is taken; with secure sums, too few sites are approved.
        InputError: there is no certificate, or it is not for that host.
    """
    _require_no_code(recipe)
    privacy = read_recipe(recipe).privacy
    roster = read_roster(files.roster).keys if privacy.secure_aggregation else {}
    if privacy.secure_aggregation and len(roster) < privacy.min_clients:
        raise RecipeError(
            f"{len(roster)} sites are approved, and privacy.min_clients is {privacy.min_clients}",
            why="the invitation tells each site the keys of all the others",
            fix="'florana flower approve' all sites' .pub files first",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} exists already", fix="name a new folder")
    hosts = hosts_of(read_certificate(files.certificate))
    if host not in hosts:
        raise InputError(
            f"{files.certificate} is not for '{host}'",
            why=f"it is for {', '.join(hosts)}",
            fix="name one of these, or make new certificates with 'florana flower keys --server'",
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "ca.crt", files.authority.read_bytes())
    replace_file(folder / "recipe.toml", recipe.read_bytes())
    if roster:
        replace_file(folder / ROSTER, files.roster.read_bytes())
    replace_file(folder / "federation.toml", tomli_w.dumps({"host": host, "port": port, "base": base}).encode())
    return folder


def read_invitation(folder: Path) -> Invitation:
    """An invitation folder. Raises InputError where a part is missing or wrong."""
    try:
        facts = read_toml(folder / "federation.toml")
        host, port, base = str(facts["host"]), int(facts["port"]), str(facts.get("base", ""))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} is no invitation to a federation",
            why=f"{type(error).__name__}: {error}",
            fix="the operator makes one with 'florana flower invite'; take the whole folder",
        ) from None
    authority, recipe = folder / "ca.crt", folder / "recipe.toml"
    read_certificate(authority)
    if not recipe.exists():
        raise InputError(f"{folder} is no invitation to a federation", why="recipe.toml is missing")
    return Invitation(folder, host, port, authority, recipe, base)


def site_recipe(invitation: Invitation, base: str | None, test: Path | None, assign: list[str]) -> Recipe:
    """The invitation's recipe as it is read at a site, with the site's own places for the model and the test set.

    Raises:
        RecipeError: the recipe is wrong, or names a method that is a file of Python.
        InputError: it names a base model by a path that is not here, and the site names none.
    """
    _require_no_code(invitation.recipe)
    recipe = read_recipe(invitation.recipe, assign)
    if base is None and Path(recipe.model.base).is_absolute() and not Path(recipe.model.base).exists():
        raise InputError(
            f"the recipe names the base model by a path, which does not lead to one here: {recipe.model.base}",
            why="a path that does not begin at the root counts from the invitation's folder",
            fix="say where this site has it: --base FOLDER",
        )
    model = recipe.model if base is None else recipe.model.model_copy(update={"base": base})
    own_test = str(test.resolve()) if test is not None else None
    if recipe.partition.kind == "sites":  # the operator's test and validation rows stay with the operator
        data = recipe.data.model_copy(update={"test": own_test, "validation": None})
        return recipe.model_copy(update={"model": model, "data": data})
    return recipe.model_copy(update={"model": model})


def _require_no_code(recipe: Path) -> None:
    """A method of one's own is a file of Python, which reading the recipe runs: of an operator's, at a site, never."""
    try:
        strategy = read_toml(recipe).get("strategy")
    except (OSError, ValueError):
        return  # `read_recipe` says what is wrong with it
    if isinstance(strategy, dict) and is_own(str(strategy.get("name"))):
        raise RecipeError(
            f"{recipe} names a method that is a file of Python: {strategy['name']}",
            why="a site runs no code of the operator",
            fix="between sites take one of florana's methods; a rule of one's own runs in simulations",
        )


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server certificate is for, in the order in which they were given."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]
