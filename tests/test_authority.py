"""Who may approve, who may run: the authority's key apart, renewed certificates, sites' new keys, a signed roster."""

from __future__ import annotations

import datetime as dt
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner

from florana.cli.main import app
from florana.errors import FloranaError, InputError, RecipeError
from florana.flower.deploy.audit_log import read_log
from florana.flower.deploy.authority import AuthorityKey, make_server, own_key, renew
from florana.flower.deploy.invitation import hosts_of
from florana.flower.deploy.keys import Certificates, make_site, read_certificate, read_private, read_public, rotate_site
from florana.flower.deploy.live_roster import LiveRoster
from florana.flower.deploy.roster import approve, read_roster, revoke
from florana.flower.deploy.serve import check_certificates
from florana.recipe.load import check

WORDS = b"correct horse"


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Certificates, AuthorityKey]:
    """A federation whose authority's key lies elsewhere, under a passphrase, with one approved site."""
    folder = tmp_path_factory.mktemp("apart")
    kept = AuthorityKey(folder / "safe" / "ca.key", WORDS)
    files = make_server(folder / "fed", ["fed.example.org"], authority=kept)
    approve(files, make_site(folder / "a", "a")[1], 7, kept)
    return files, kept


def test_a_key_that_is_kept_apart_is_not_at_the_server(apart: tuple[Certificates, AuthorityKey]) -> None:
    files, kept = apart
    assert sorted(path.name for path in files.folder.iterdir()) == ["ca.crt", "roster.json", "server.crt", "server.key"]
    assert b"ENCRYPTED" in kept.path.read_bytes()
    assert kept.path.stat().st_mode & 0o077 == 0
    check_certificates(files)  # a server needs no more


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (lambda files, kept: None, "is not at"),
        (lambda files, kept: AuthorityKey(kept.path), "cannot be opened"),
        (lambda files, kept: AuthorityKey(kept.path, b"wrong"), "the passphrase is wrong"),
        (lambda files, kept: AuthorityKey(files.key), "is not the key of"),
        (lambda files, kept: AuthorityKey(files.key, WORDS), "leave --passphrase-file out"),
        (lambda files, kept: AuthorityKey(files.certificate), "cannot be opened"),
    ],
)
def test_nobody_approves_revokes_or_renews_without_it(
    key: Callable[..., AuthorityKey | None], says: str, apart: tuple[Certificates, AuthorityKey], tmp_path: Path
) -> None:
    files, kept = apart
    before = {path.name: path.read_bytes() for path in files.folder.iterdir()}
    given = key(files, kept)
    public = make_site(tmp_path, "b")[1]
    acts: list[Callable[[], Any]] = [
        lambda: approve(files, public, None, given),
        lambda: approve(files, files.folder.parent / "a" / "a.pub", 10**9, given),
        lambda: revoke(files, "a", given),
        lambda: renew(files, authority=given),
    ]
    for act in acts:
        with pytest.raises(InputError) as caught:
            act()
        assert says in f"{caught.value} {caught.value.why} {caught.value.fix}"
    assert {path.name: path.read_bytes() for path in files.folder.iterdir()} == before


def _another_site(content: dict[str, Any]) -> None:
    content["clients"]["b"] = content["clients"]["a"]


def _more_rows(content: dict[str, Any]) -> None:
    content["clients"]["a"]["rows"] = 10**9


def _off(content: dict[str, Any]) -> None:
    content["clients"] = {}


def _younger(content: dict[str, Any]) -> None:
    content["number"] = 99


def _unsigned(content: dict[str, Any]) -> None:
    del content["signature"]


def _no_base64(content: dict[str, Any]) -> None:
    content["signature"] = "?" + content["signature"]


@pytest.mark.parametrize("change", [_another_site, _more_rows, _off, _younger, _unsigned, _no_base64])
def test_a_roster_that_was_changed_without_the_key_counts_for_nothing(
    change: Callable[[dict[str, Any]], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = make_server(tmp_path / "fed", ["x"])
    approve(files, make_site(tmp_path / "a", "a")[1], 7)
    began = read_roster(files.roster)
    live = LiveRoster(files.roster, began)
    content = json.loads(files.roster.read_text())
    change(content)
    files.roster.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_roster(files.roster)
    says = "cannot be read" if change is _no_base64 else "is not signed by the authority"
    assert says in str(caught.value)
    assert dict(live) == {began.keys["a"]: "a"}
    assert says in caplog.text


def test_an_older_roster_brings_nobody_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = make_server(tmp_path / "fed", ["x"])
    for name in ("a", "b"):
        approve(files, make_site(tmp_path / name, name)[1])
    older, began = files.roster.read_bytes(), read_roster(files.roster)
    live = LiveRoster(files.roster, began)
    revoke(files, "b")
    assert set(live.values()) == {"a"}
    files.roster.write_bytes(older)
    assert set(live.values()) == {"a"}
    assert "older roster" in caplog.text
    assert read_roster(files.roster).number == began.number == 2


def test_a_renewed_server_is_one_for_the_old_invitations(tmp_path: Path) -> None:
    """The same authority signs it, for the same hosts and one more; an end comes no later than the authority's."""
    begin = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    files = make_server(tmp_path / "fed", ["fed.example.org", "10.0.0.7"], days=30, now=begin)
    authority, before = files.authority.read_bytes(), files.key.read_bytes()
    with pytest.raises(InputError, match="florana flower renew"):
        check_certificates(files)
    end = renew(files, days=400, also=["other.example.org"], now=dt.datetime(2026, 11, 1, tzinfo=dt.UTC))
    certificate = read_certificate(files.certificate)
    assert certificate.not_valid_after_utc == end == dt.datetime(2027, 12, 5, 23, 55, tzinfo=dt.UTC)
    hosts = ["fed.example.org", "10.0.0.7", "localhost", "127.0.0.1", "other.example.org"]
    assert hosts_of(certificate) == hosts
    certificate.verify_directly_issued_by(read_certificate(files.authority))
    assert files.authority.read_bytes() == authority
    assert files.key.read_bytes() != before
    assert files.key.stat().st_mode & 0o077 == 0
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
    last = renew(files, days=36500, now=dt.datetime(2035, 1, 1, tzinfo=dt.UTC))
    assert last == read_certificate(files.authority).not_valid_after_utc
    with pytest.raises(InputError, match="was valid until"):
        renew(files, now=dt.datetime(2036, 1, 1, tzinfo=dt.UTC))


def test_a_key_that_is_not_the_certificates_is_found_before_a_run(tmp_path: Path) -> None:
    files, other = make_server(tmp_path / "fed", ["x"]), make_server(tmp_path / "other", ["x"])
    files.key.write_bytes(other.key.read_bytes())
    with pytest.raises(InputError, match="is not the key of"):
        check_certificates(files)
    renew(files)
    check_certificates(files)


def test_a_sites_new_key_takes_the_place_of_the_one_that_signed_it(tmp_path: Path) -> None:
    files = make_server(tmp_path / "fed", ["x"])
    private, public = make_site(tmp_path / "site", "a")
    approve(files, public, 7)
    old, before = private.read_bytes(), read_roster(files.roster)
    assert rotate_site(tmp_path / "site", "a") == (private, public)
    assert private.read_bytes() != old
    assert private.stat().st_mode & 0o777 == 0o600
    kept = private.with_name("a.key-before")
    assert kept.read_bytes() == old
    assert kept.stat().st_mode & 0o777 == 0o600
    assert read_private(tmp_path / "site") == ("a", private), "one key is found, the new one"
    assert approve(files, public) == ("a", True)
    after = read_roster(files.roster)
    assert after.keys["a"] != before.keys["a"]
    assert after.rows == {"a": 7}
    with pytest.raises(RecipeError, match="is still there"):
        rotate_site(tmp_path / "site", "a")
    kept.unlink()
    rotate_site(tmp_path / "site", "a")
    assert approve(files, public) == ("a", True)


def test_a_key_of_another_name_is_not_put_in_a_sites_place(tmp_path: Path) -> None:
    private, public = make_site(tmp_path, "a")
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(InputError, match="holds the key of 'a'"):
        rotate_site(tmp_path, "b")
    assert (private.read_bytes(), public.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "a.pub"]


def test_keys_of_another_kind_or_with_another_sort_of_name_are_none(tmp_path: Path) -> None:
    """Flower signs with elliptic curves alone, and a name goes into paths."""
    other = ed25519.Ed25519PrivateKey.generate()
    public = tmp_path / "a.pub"
    openssh = other.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public.write_bytes(openssh + b" a\n")
    with pytest.raises(InputError, match="is no public key of a site"):
        read_public(public)
    true = make_site(tmp_path / "site", "a")[1].read_bytes()
    for name in (b" ../b\n", b" a/b\n", b" .a\n", b" " + b"a" * 65 + b"\n", b"\n", b" \xff\n"):
        public.write_bytes(true.replace(b" a\n", name))
        with pytest.raises(InputError, match="is no public key of a site"):
            read_public(public)
    private = tmp_path / "a.key"
    private.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    private.chmod(0o600)
    with pytest.raises(InputError, match="is no private key of a site"):
        read_private(tmp_path)


def _stranger(folder: Path) -> Path:
    return make_site(folder / "stranger", "a")[1]


def _someone_elses_proof(folder: Path) -> Path:
    """The stranger's own rotation: signed, by a key that was never approved."""
    make_site(folder / "stranger", "a")
    return rotate_site(folder / "stranger", "a")[1]


def _borrowed_proof(folder: Path) -> Path:
    """The stranger's key with the signature that the true site gave its own new key."""
    proof = rotate_site(folder / "site", "a")[1].read_bytes().splitlines()[1]
    public = make_site(folder / "stranger", "a")[1]
    public.write_bytes(public.read_bytes() + proof + b"\n")
    return public


def _another_name(folder: Path) -> Path:
    """The true site's new key and signature under the name of another approved site."""
    public = rotate_site(folder / "site", "a")[1]
    public.write_bytes(public.read_bytes().replace(b" a\n", b" b\n"))
    return public


@pytest.mark.parametrize("made", [_stranger, _someone_elses_proof, _borrowed_proof, _another_name])
def test_a_new_key_without_the_old_ones_word_is_refused(made: Callable[[Path], Path], tmp_path: Path) -> None:
    files = make_server(tmp_path / "fed", ["x"])
    approve(files, make_site(tmp_path / "site", "a")[1])
    approve(files, make_site(tmp_path / "b", "b")[1])
    before = files.roster.read_bytes()
    with pytest.raises(RecipeError, match="approved already, with another key") as caught:
        approve(files, made(tmp_path))
    assert "is not signed by that key" in caught.value.why
    assert files.roster.read_bytes() == before


@pytest.mark.parametrize("second", [b"signed-by-the-key-before \xff\n", b"x" * 2**15, b"signed-by-the-key-before ?\n"])
def test_a_public_key_file_with_rubbish_behind_it_is_refused(second: bytes, tmp_path: Path) -> None:
    files = make_server(tmp_path / "fed", ["x"])
    approve(files, make_site(tmp_path / "site", "a")[1])
    public = make_site(tmp_path / "new", "a")[1]
    public.write_bytes(public.read_bytes() + second)
    with pytest.raises(FloranaError):
        approve(files, public)


def test_the_commands_of_an_operator_whose_authority_is_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words").write_bytes(WORDS + b"\n")

    def run(line: str) -> str:
        result = CliRunner().invoke(app, ["flower", *line.split()], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    def refused(line: str) -> str:
        with pytest.raises(FloranaError) as caught:
            run(line)
        return f"{caught.value} {caught.value.fix}"

    key = "--authority-key safe/ca.key --passphrase-file words"
    assert "safe/ca.key" in run(f"keys fed.example.org --server --out fed {key}")
    run("keys a --out site")
    assert "approved: a, 5 training rows" in run(f"approve fed site/a.pub --rows a=5 {key}")
    assert "--authority-key FILE" in refused("revoke fed a")
    assert "site/a.key-before" in run("keys a --out site --rotate")
    assert "with a new key in the place" in run(f"approve fed site/a.pub {key}")
    assert "valid until" in run(f"renew fed --days 10 {key}")
    run(f"revoke fed a {key}")
    events = [entry.event for entry in read_log(Path("fed"), None)[0]]
    assert events == ["approved", "rotated", "renewed", "revoked"]
    Path("words").write_text("\n")
    assert "begins with an empty line" in refused(f"renew fed {key}")
    assert "cannot be read" in refused("renew fed --passphrase-file nowhere")
    assert "for the operator" in refused("keys b --out b --passphrase-file words")
    assert "is for a site's key" in refused("keys x --server --out y --rotate")
    assert own_key(Certificates(Path("fed"))).path == Path("fed/ca.key")


def test_the_doctor_says_a_month_before_that_a_certificate_comes_to_its_end(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    from florana.flower.deploy.doctor import at_server

    def found(days: int) -> tuple[bool, str]:
        files = make_server(tmp_path / str(days), ["x"], days=days)
        findings = at_server(check(recipe_table, "t"), files, tmp_path, "127.0.0.1", 0, base=False)
        finding = next(finding for finding in findings if finding.what == "certificates")
        return finding.fine, finding.fix

    assert found(32)[0]
    assert found(29) == (False, f"'florana flower renew {tmp_path / '29'}'")
