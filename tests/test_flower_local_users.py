"""Another account of the machine, at either end of a standing federation: nothing to list, read, push or start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.flower.deploy.audit_log import read_log
from tests.deployment import Fed, environment, federation
from tests.program import wait_for

NOBODY = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),  # to read the interpreter, wherever it lies
]
AS_NOBODY = NOBODY if os.geteuid() == 0 and shutil.which("setpriv") else []  # else the tests' own account

# every request of Flower's three APIs, with a key of its own, at one port
PROBER = """
import base64, json, sys
import httpx
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

port, authority = sys.argv[1:]
private, public = generate_key_pairs()
mine = NodeAuthHttpInterceptor(private, public)
found = {}
for scheme in ("https", "http"):
    address = f"{scheme}://127.0.0.1:{port}"
    with httpx.Client(verify=authority if scheme == "https" else True, timeout=5) as client:
        looks = [("GET", path) for path in ("/", "/health", "/docs", "/openapi.json")]
        for method, path in [*PROTOBUF_REQUEST_TYPES, *looks]:
            try:
                sent = client.request(method, address + path, headers={"content-type": "application/protobuf"})
                found[f"{method} {scheme} {path}"] = sent.status_code
            except httpx.TransportError as error:
                found[f"{method} {scheme} {path}"] = type(error).__name__
with FleetHttpClient.from_server_address(f"127.0.0.1:{port}", False, open(authority, "rb").read(), [mine]) as client:
    calls = {
        "own key": lambda: client.ActivateNode(
            ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)),
        "another's node": lambda: client.PullMessages(PullMessagesRequest(node=Node(node_id=1))),
    }
    for name, call in calls.items():
        try:
            found[name] = str(call())
        except httpx.HTTPStatusError as error:
            found[name] = error.response.status_code
print(json.dumps(found))
"""


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder that every account of the machine can use."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def ports(process: psutil.Process) -> set[int]:
    return {c.laddr.port for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}


def probed(port: int, authority: Path, public: Path) -> dict[str, Any]:
    script = public / "prober.py"
    script.write_text(PROBER)
    own = {**environment(public), "HOME": str(public), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*AS_NOBODY, sys.executable, str(script), str(port), str(authority)],
        env=own, cwd=public, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def flwr(public: Path, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Flower's own command, as another account."""
    home = public / "home"
    home.mkdir(exist_ok=True)
    home.chmod(0o777)
    (home / "config.toml").write_text(
        f'[superlink.there]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{public / "ca.crt"}"\n'
    )
    command = [*AS_NOBODY, str(Path(sys.executable).with_name("flwr")), *arguments, "there"]
    own = {**environment(home), "HOME": str(public), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=own, cwd=public, capture_output=True, text=True, timeout=120, check=False)


def serving(fed: Fed, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "florana", *fed.serving("--wait", "400", "--deadline", "60", "--no-base")]
    with (folder / "serve.log").open("wb") as log:
        return subprocess.Popen(command, env=environment(fed.home), stdout=log, stderr=log)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's list of processes")
def test_another_account_gets_nothing_at_either_end(recipe_table: dict[str, Any], tmp_path: Path, public: Path) -> None:
    recipe_table["partition"] = {"kind": "iid", "clients": 2}
    recipe_table["federation"] = {"rounds": 2, "min_clients": 2}
    recipe_table["train"] = {"steps": 1, "batch_size": 4}
    with federation(recipe_table, tmp_path, ["client-0", "client-1"], join=False) as fed:
        server = serving(fed, tmp_path)
        site = fed.join("client-0")
        log = fed.out / "progress.jsonl"
        assert wait_for(lambda: log.exists() and '"joined"' in log.read_text(), 120), (
            tmp_path / "serve.log"
        ).read_text()

        ends = {"server": psutil.Process(server.pid), "site": psutil.Process(site.pid)}
        assert [end for end, process in ends.items() if process.children(recursive=True)] == [], "a program was started"
        assert ports(ends["site"]) == set()
        assert ports(ends["server"]) == {fed.port}, "the gateway, and nothing behind it"
        for process in ends.values():
            assert [c.laddr for c in process.net_connections(kind="unix") if c.laddr and not c.raddr] == []
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            assert not any(sign in words for sign in (b"token", b"secret", b"BEGIN", b"PRIVATE"))
        for secret in (fed.files.folder / "flower", tmp_path / "client-0" / "flower", tmp_path / "client-0" / "kept"):
            assert secret.stat().st_mode & 0o077 == 0, secret
        for key in (fed.files.key, fed.files.folder / "ca.key", tmp_path / "client-0" / "client-0.key"):
            assert key.stat().st_mode & 0o077 == 0, key

        shutil.copy(fed.files.authority, public / "ca.crt")  # it is public: every site has it
        found = probed(fed.port, public / "ca.crt", public)
        got = {name: answer for name, answer in found.items() if isinstance(answer, int) and answer < 400}
        assert got == {}, "nothing but refusals"
        assert {answer for name, answer in found.items() if "/v1/fleet/" not in name and " https " in name} == {404}
        assert {answer for name, answer in found.items() if "https /v1/fleet/" in name} == {401, 415} & {
            answer for name, answer in found.items() if "https /v1/fleet/" in name
        }
        assert found["own key"] == 412
        assert found["another's node"] == 412, "the key is judged before the node that it speaks for"
        (public / "app").mkdir()
        for arguments in (["list"], ["supernode", "list"], ["federation", "list"]):
            done = flwr(public, fed.port, *arguments)
            assert done.returncode != 0, f"flwr {arguments}: {done.stdout}"
        from florana.flower.app.export import export
        from florana.recipe.load import check

        export(check(recipe_table, "t"), public / "app" / "mine")
        subprocess.run(["chmod", "-R", "a+rX", str(public / "app")], check=True)
        done = flwr(public, fed.port, "run", str(public / "app" / "mine"))
        assert done.returncode != 0, done.stdout

        fed.join("client-1")  # the run goes on as if nobody had been there
        assert server.wait(400) == 0, (tmp_path / "serve.log").read_text()
        assert len((fed.out / "rounds.jsonl").read_text().splitlines()) == 2
        assert "refused" not in log.read_text()
        assert site.wait(90) == 0, "it ends with the run"
        assert fed.sites["client-1"].wait(90) == 0
        both_ends_tell_one_story(fed.files.folder, [tmp_path / "client-0", tmp_path / "client-1"])
        for folder in (tmp_path / "client-0", tmp_path / "client-1", fed.out, fed.files.folder / "flower"):
            written = [path for path in folder.rglob("*") if path.suffix != ".pub"]
            assert written
            assert [path for path in written if path.stat().st_mode & 0o077] == [], "for others to read"


def both_ends_tell_one_story(operator: Path, sites: list[Path]) -> None:
    """By their audit logs: what the server got is what the sites sent."""
    entries, _ = read_log(operator)
    events = [entry.event for entry in entries]
    assert events[:3] == ["approved", "approved", "serving"]
    assert events[-1] == "done"
    counts = {event: events.count(event) for event in ("joined", "asked", "answered", "committed", "told")}
    assert counts == {"joined": 2, "asked": 4, "answered": 4, "committed": 2, "told": 2}
    arrived = {(entry.facts["site"], entry.facts["sha256"]) for entry in entries if entry.event == "answered"}
    for site in sites:
        own, _ = read_log(site)
        sent = {e.facts["sha256"] for e in own if e.event == "answered" and e.facts["kind"] == "reply"}
        assert sent == {digest for name, digest in arrived if name == site.name}
        assert (own[0].event, own[-1].event) == ("joining", "left")
