"""docs/sites.md and docs/privacy.md, as three hospitals would follow them: every command, in order, on this machine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")


from florana.dp.accounting import Budget
from florana.dp.ledger import Ledger, spent
from florana.flower.deploy.audit_log import read_log
from tests.conftest import ROOT
from tests.deployment import PROGRAM, end_all, environment, free_port
from tests.program import HANGS, florana, wait_for

pytestmark = pytest.mark.slow
PAGES = {"sites.md": ("sites.md", "flower.md"), "privacy.md": ("privacy.md",)}
"""A page, and those whose commands are run."""
SITES = ["hospital-a", "hospital-b", "hospital-c"]


def text_of(*pages: str) -> str:
    return "".join((ROOT / "docs" / name).read_text() for name in pages)


def commands(page: str) -> list[tuple[str, str]]:
    """(who, command) of every console line of the page, and of those that belong to it."""
    lines = "\n".join(re.findall(r"```console\n(.*?)```", text_of(*PAGES[page]), flags=re.DOTALL)).splitlines()
    return [(who, command) for who, _, command in (line.partition("$ ") for line in lines if line)]


class Place:
    """The folders of four machines, on this one."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.left: list[tuple[str, subprocess.Popen[bytes]]] = []

    def run(self, who: str, command: str) -> None:
        words = shlex.split(command.removesuffix("&").replace("fed.example.org", "127.0.0.1"))
        assert words[0] == "florana"
        if words[1] in ("serve",) or words[2:3] == ["invite"] or words[1:3] == ["doctor", "recipe.toml"]:
            words += ["--port", str(self.port)]
        if words[1] == "serve":
            words += ["--host", "127.0.0.1", "--wait", str(HANGS), "--deadline", str(HANGS)]
        if command.endswith("&"):
            own = environment(self.folder / "home")
            with (self.folder / f"{who}.log").open("ab") as log:
                begun = subprocess.Popen([*PROGRAM, *words[1:]], stdout=log, stderr=log, cwd=self.folder / who, env=own)
            self.left.append((who, begun))
            if words[1] == "serve":
                assert wait_for(lambda: "listening on port" in self.said(who)), self.said(who)
            return
        done = florana(*words[1:], cwd=self.folder / who)
        assert done.returncode == 0, f"{who}$ {command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr

    def said(self, who: str) -> str:
        path = self.folder / f"{who}.log"
        return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("page", PAGES)
def test_the_page_makes_a_federation_of_three_sites(
    page: str, tiny_bert: Path, sentences: Path, tmp_path: Path
) -> None:
    recipe = tomllib.loads(re.findall(r"```toml\n(.*?)```", text_of(page), flags=re.DOTALL)[0])
    recipe["model"] |= {"base": str(tiny_bert), "target_modules": ["query", "value"]}
    recipe["train"] = {"steps": 2, "batch_size": 8}
    recipe["federation"]["rounds"] = 2
    rows = sentences.read_text().splitlines()
    place = Place(tmp_path, free_port())
    rehearsal = tmp_path / "operator" / "rehearsal"
    rehearsal.mkdir(parents=True)
    for index, site in enumerate(SITES):
        (tmp_path / site).mkdir()
        (tmp_path / site / "rows.csv").write_text("\n".join([rows[0], *rows[1 + 30 * index : 31 + 30 * index]]) + "\n")
        shutil.copy(tmp_path / site / "rows.csv", rehearsal / f"{site}.csv")
    (tmp_path / "operator" / "recipe.toml").write_text(tomli_w.dumps(recipe))
    run = tmp_path / "operator" / "runs" / "first"
    try:
        for who, command in commands(page):
            if "approve" in command:  # the .pub files reach the operator
                for site in SITES:
                    shutil.copy(tmp_path / site / "site" / f"{site}.pub", tmp_path / "operator")
            if "--resume" in command:  # "if anything dies": it does, in the last round
                assert wait_for(lambda: (run / "rounds.jsonl").exists()), place.said("operator")
                serve = next(process for name, process in place.left if name == "operator")
                serve.kill()
                serve.wait()
            place.run(who, command)
            if "invite" in command:  # the invitation reaches the sites
                for site in SITES:
                    shutil.copytree(tmp_path / "operator" / "invitation", tmp_path / site / "invitation")
        if page == "privacy.md":  # it has no server that dies: wait for the end
            assert wait_for(lambda: all(p.poll() == 0 for _, p in place.left)), place.said("operator")
        rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        assert [entry["round"] for entry in rounds] == [1, 2]
        assert all(entry["clients"] == SITES for entry in rounds)
        computes = json.loads((run / "setup.json").read_text())["computes"]
        assert {name: own["threads"] for name, own in computes.items()} == dict.fromkeys(SITES, recipe["threads"])
        held = json.loads((run / "setup.json").read_text())["clients"]
        told = ["test"] if page == "privacy.md" else ["test", "train"]
        assert [sorted(own) for own in held.values()] == [told] * 3, "what of each class is nobody's business"
        if page == "privacy.md":
            nobody_saw_an_update(run, tmp_path, rounds)
        adapter = "adapter/adapter_model.safetensors"
        same = (run / adapter).read_bytes() == (run.parent / "rehearsal" / adapter).read_bytes()
        assert same == (page != "privacy.md"), "sites draw noise that nobody can repeat"
        for site in SITES:  # each has the run's adapter, and has left by itself
            own = tmp_path / site / "site" / adapter
            assert wait_for(own.exists), place.said(site)
            assert own.read_bytes() == (run / adapter).read_bytes()
            assert wait_for(lambda site=site: all(p.poll() == 0 for name, p in place.left if name == site))
        for site in SITES:
            assert (tmp_path / site / "site" / f"{site}.key").stat().st_mode & 0o077 == 0
        for secret in ("ca.key", "server.key"):
            assert not list(tmp_path.glob(f"hospital-*/**/{secret}")), "a private key has left its place"
    finally:
        children = [child for _, p in place.left if p.poll() is None for child in descendants(p.pid)]
        for _, process in place.left:
            process.terminate()
        for _, process in place.left:
            process.wait(HANGS)
        gone = wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in children), 120)
        end_all(tmp_path)
    assert gone, "programs that florana started outlived it"


def nobody_saw_an_update(run: Path, folder: Path, rounds: list[dict[str, Any]]) -> None:
    """The server has sums alone, and each site wrote down what it opened and what it was asked."""
    assert [entry["notes"]["answered"] for entry in rounds] == [[3, 3], [3, 3]]
    assert all(entry["examples"] == entry["weights"] == {} for entry in rounds)
    assert rounds[0]["error"]["overall"] is None  # nobody can measure it
    assert "its rows hidden" in (run / "progress.jsonl").read_text()
    page = (run / "report.html").read_text()
    assert "sums over 3 clients or more" in page
    assert "epsilon &lt;= 8, delta = 1e-06" in page
    assert "seed: whoever has the recipe" not in page
    for site in SITES:
        place = folder / site / "site"
        opened = [json.loads(line)[1] for line in (place / "kept" / "opened.jsonl").read_text().splitlines()]
        assert opened == [[1, 0, 0], [1, 0, 1], [2, 0, 0], [2, 0, 1]]
        assert stat.S_IMODE((place / "kept" / "opened.jsonl").stat().st_mode) == 0o600
        entries, torn = read_log(place)
        assert not torn
        steps = [entry.facts.get("step") for entry in entries if entry.event == "asked"]
        assert steps.count("masked") == steps.count("reveal") == 4
        text = (place / "audit.jsonl").read_text()
        ledger = Ledger(place / "kept" / "privacy.jsonl")
        charges = ledger.charges(site)
        assert [charge.round for charge in charges] == [1, 2]
        assert 7.9 < spent(charges, Budget(8.0, 1e-6)) <= 8.0
        assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
        costs = [entry.facts["epsilon"] for entry in entries if "epsilon" in entry.facts]
        assert len(costs) == 2
        assert float(costs[0]) < float(costs[1]) == pytest.approx(spent(charges, Budget(8.0, 1e-6)), abs=1e-4)
        assert "sealing" not in text
        assert 'shares":' not in text


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)
