"""Who is not let in: at Flower's fleet API behind the real door, over TLS."""

from __future__ import annotations

import datetime as dt
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.errors import FederationError, InputError, RecipeError
from florana.flower.app.settings import Settings
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.fleet import make_link
from florana.flower.deploy.gateway import Door, open_door, trusting
from florana.flower.deploy.invitation import invite
from florana.flower.deploy.keys import Certificates, make_site
from florana.flower.deploy.roster import approve, read_roster
from florana.flower.deploy.serve import check_certificates, serve
from florana.recipe.load import read_recipe
from tests.deployment import PROGRAM, end_all, environment, free_port
from tests.program import HANGS

pytestmark = [pytest.mark.chaos, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@dataclass
class Standing:
    """A server that stands, with one approved site."""

    folder: Path
    files: Certificates
    port: int
    recipe: Path
    limit: int


@pytest.fixture(scope="module")
def standing(tiny_bert: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    folder = tmp_path_factory.mktemp("standing")
    table: dict[str, Any] = {
        "task": "sequence-classification",
        "model": {"base": str(tiny_bert), "target_modules": ["query"], "rank": 2},
        "data": {"train": str(sentences), "label": "label"},
        "partition": {"clients": 3},
        "train": {"steps": 1},
        "strategy": {"name": "fedit"},
    }
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(table))
    files, port = make_server(folder / "fed", ["127.0.0.1"]), free_port()
    make_site(folder / "client-0", "client-0")
    approve(files, folder / "client-0" / "client-0.pub")
    invite(recipe, files, "127.0.0.1", port, folder / "invitation")
    limit = 100_000
    keys = read_roster(files.roster).keys
    _, fleet = make_link(keys)
    opened = open_door(
        Door(fleet, limit, {key: client for client, key in keys.items()}),
        "127.0.0.1",
        port,
        files.certificate,
        files.key,
    )
    try:
        yield Standing(folder, files, port, recipe, limit)
    finally:
        opened.close()
        end_all(folder)


def join(standing: Standing, site: Path, invitation: Path | None = None) -> subprocess.CompletedProcess[str]:
    place = invitation or standing.folder / "invitation"
    command = [*PROGRAM, "join", str(place), "--site", str(site)]
    home = environment(standing.folder / "home")
    return subprocess.run(command, env=home, capture_output=True, text=True, timeout=HANGS, check=False)


def test_an_unapproved_key_is_refused(standing: Standing, tmp_path: Path) -> None:
    make_site(tmp_path / "site", "client-1")
    done = join(standing, tmp_path / "site")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "does not know this site's key" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_authority_is_refused(standing: Standing, tmp_path: Path) -> None:
    other = make_server(tmp_path / "other", ["127.0.0.1"])
    invite(standing.recipe, other, "127.0.0.1", standing.port, tmp_path / "invitation")
    done = join(standing, standing.folder / "client-0", tmp_path / "invitation")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "does not hold" in done.stderr


def test_a_certificate_out_of_date_is_refused_at_both_ends(standing: Standing, tmp_path: Path) -> None:
    old = make_server(tmp_path / "old", ["127.0.0.1"], days=1, now=dt.datetime.now(dt.UTC) - dt.timedelta(days=9))
    with pytest.raises(InputError, match="is valid from"):
        check_certificates(old)
    port = free_port()
    opened = open_door(Door(make_link({})[1], 1, {}), "127.0.0.1", port, old.certificate, old.key)
    try:
        invite(standing.recipe, old, "127.0.0.1", port, tmp_path / "invitation")
        done = join(standing, standing.folder / "client-0", tmp_path / "invitation")
    finally:
        opened.close()
    assert done.returncode == 4, done.stdout + done.stderr
    assert "expired" in done.stderr


def test_the_door_passes_nothing_but_the_nodes_requests(standing: Standing) -> None:
    with httpx.Client(
        verify=trusting(standing.files.authority), base_url=f"https://127.0.0.1:{standing.port}"
    ) as client:
        for path in ("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/get-nodes", "/", "/docs"):
            assert client.post(path, content=b"x").status_code == 404, path
        assert client.get("/v1/fleet/pull-messages").status_code == 404
        assert client.post("/v1/fleet/../control/start-run", content=b"").status_code == 404
        assert client.post("/v1/fleet/pull-messages", content=b"").status_code >= 400, "without a key: Flower refuses"


def test_a_payload_bomb_is_cut_off(standing: Standing) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0

    def bomb() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(4000):
            sent += 2**16
            yield bytes(2**16)

    with httpx.Client(verify=trusting(standing.files.authority)) as client:
        url = f"https://127.0.0.1:{standing.port}/v1/fleet/push-object"
        try:
            answer = client.post(url, content=bomb(), headers={"flwr-public-key": "x"})
            assert answer.status_code == 401, "whoever has no key is not read any further"
        except httpx.HTTPError:
            pass  # the door closed while the bomb was still going off
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sent < 4000 * 2**16, "it was not cut off"
    assert grown < 2 * (standing.limit + 2**20) + 2**23


def test_a_port_in_use_is_an_error_and_nothing_is_left(standing: Standing, tmp_path: Path) -> None:
    files = make_server(tmp_path / "fed", ["127.0.0.1"])
    make_site(tmp_path / "a", "client-0")
    approve(files, tmp_path / "a" / "client-0.pub")
    with pytest.raises(FederationError, match="cannot be served"):
        serve(read_recipe(standing.recipe), files, tmp_path / "run", Settings(), host="127.0.0.1", port=standing.port)
    assert end_all(tmp_path) == [], "programs were left behind"


def test_too_few_approved_sites_are_an_error_before_anything_starts(standing: Standing, tmp_path: Path) -> None:
    files = make_server(tmp_path / "fed", ["127.0.0.1"])
    with pytest.raises(RecipeError, match="0 sites are approved"):
        serve(read_recipe(standing.recipe), files, tmp_path / "run", Settings())
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="a small file system needs root")
def test_a_full_disk_at_the_server_keeps_the_old_round(standing: Standing, tmp_path: Path) -> None:
    """A real file system of 1 MiB, filled by somebody else in the middle of the run."""
    from florana.federation.journal import read_records
    from florana.runs.setup import execute

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        recipe = read_recipe(standing.recipe, ["federation.rounds=4"])

        def fill(event: Any) -> None:
            if event.kind == "committed" and event.round == 2:
                with (small / "filler").open("wb", buffering=0) as stream:
                    try:
                        while True:
                            stream.write(bytes(4096))
                    except OSError:
                        pass

        with pytest.raises(FederationError, match=r"could not be (saved|kept)") as caught:
            execute(recipe, small / "run", show=fill)
        assert "free some disk space" in caught.value.fix
        assert len(read_records(small / "run" / "rounds.jsonl")) == 2
        (small / "filler").unlink()
        execute(recipe, small / "run", resume=True)
        execute(recipe, tmp_path / "whole")
        adapter = "adapter/adapter_model.safetensors"
        assert (small / "run" / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
    finally:
        subprocess.run(["umount", str(small)], check=False)
