"""A site's side of secure sums: its signatures, the roster in its invitation, what it has opened, on its disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.errors import InputError, RecipeError
from florana.flower.app.export import export
from florana.flower.app.sealed_site import OPENED, on_disk, sealed_at
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.invitation import invite, read_invitation
from florana.flower.deploy.keys import make_site, read_private
from florana.flower.deploy.roster import approve, revoke
from florana.flower.deploy.site_signatures import signer_of
from florana.recipe.load import check

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NAMES = ["client-0", "client-1", "client-2"]


def hidden(table: dict[str, Any]) -> dict[str, Any]:
    """Three clients, best-rank from secure sums, two rounds."""
    return {
        **table,
        "partition": {"kind": "dirichlet", "clients": 3, "alpha": 1.0},
        "federation": {"rounds": 2, "min_clients": 3},
        "strategy": {"name": "best-rank", "source": "sums"},
        "privacy": {"secure_aggregation": True, "max_rows": 500},
        "evaluate": {"personal": "never"},
    }


@pytest.fixture
def invited(recipe_table: dict[str, Any], tmp_path: Path) -> Any:
    import tomli_w

    files = make_server(tmp_path / "fed", ["127.0.0.1"])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(hidden(recipe_table)))
    for name in NAMES:
        approve(files, make_site(tmp_path / name, name)[1])
    invite(recipe, files, "127.0.0.1", 1234, tmp_path / "invitation")
    return files, recipe, read_invitation(tmp_path / "invitation")


def test_signatures_are_of_the_roster_in_the_invitation(invited: Any, tmp_path: Path) -> None:
    _, _, invitation = invited
    signers = {name: signer_of(invitation, *read_private(tmp_path / name)) for name in NAMES}
    signature = signers["client-1"].sign(b"keys")
    assert signers["client-0"].verify("client-1", b"keys", signature)
    for name, content, signed in (
        ("client-2", b"keys", signature),
        ("client-1", b"other", signature),
        ("client-1", b"keys", signature[:-1] + bytes([signature[-1] ^ 1])),
        ("client-1", b"keys", b""),
        ("mallory", b"keys", signature),
    ):
        assert not signers["client-0"].verify(name, content, signed)


def test_a_site_that_is_not_on_the_roster_says_so(invited: Any, tmp_path: Path) -> None:
    files, recipe, invitation = invited
    make_site(tmp_path / "late", "late")
    with pytest.raises(InputError, match="does not have this site's key"):
        signer_of(invitation, *read_private(tmp_path / "late"))
    make_site(tmp_path / "impostor", "client-1")  # the name of another, with a key of its own
    with pytest.raises(InputError, match="does not have this site's key"):
        signer_of(invitation, *read_private(tmp_path / "impostor"))
    revoke(files, "client-2")
    with pytest.raises(RecipeError, match=r"2 sites are approved, and privacy.min_clients is 3"):
        invite(recipe, files, "127.0.0.1", 1234, tmp_path / "second")


def test_an_exported_app_says_that_it_cannot(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not run in an exported app"):
        export(check(hidden(recipe_table), "x"), tmp_path / "app")


def test_what_was_opened_is_known_after_a_restart_and_a_cut_line_opened_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kept" / OPENED
    spent = on_disk(path)
    assert spent("run", (1, 0, 0), None) is None
    assert spent("run", (1, 0, 0), "first") == "first"
    assert spent("run", (1, 0, 0), "first") == "first"  # asked for again: not twice in the file
    assert len(path.read_text().splitlines()) == 1
    again = on_disk(path)
    assert again("run", (1, 0, 0), None) == "first"
    assert again("run", (1, 0, 1), None) is again("other", (1, 0, 0), None) is again("run", (1, 1, 0), None) is None
    with path.open("ab") as stream:
        stream.write(b'["run", [2, 0, 0], "cut')
    assert on_disk(path)("run", (2, 0, 0), None) is None
    assert on_disk(path)("run", (2, 0, 0), "second") == "second"  # in a line of its own
    assert on_disk(path)("run", (2, 0, 0), None) == "second"
    path.write_bytes(b"nonsense\n")
    with pytest.raises(InputError, match="cannot be read"):
        on_disk(path)("run", (1, 0, 0), None)


def test_a_site_without_signatures_has_no_part_in_secure_sums(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """A simulation of Flower's: no client there could tell a server's key from another client's."""
    private = {"secure_aggregation": True, "max_rows": 1000}
    table = {**recipe_table, "evaluate": {"personal": "never"}, "strategy": {"name": "fedit"}}
    assert sealed_at(check(table, "t"), None, 5, tmp_path) is None
    with pytest.raises(RecipeError, match="does not run in a simulation of Flower's"):
        sealed_at(check({**table, "privacy": private}, "t"), None, 5, tmp_path)
