"""The command line as a user meets it: real processes, exit codes, no traceback, JSON for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from florana import Adapter, AdapterCard, LoraFactors, read_adapter, write_adapter
from florana.cli.main import app
from florana.recipe.load import check
from tests.program import florana, started


@pytest.fixture
def recipe(recipe_table: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(check(recipe_table, "test").to_toml())
    return path


def test_run_report_and_json(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = started("run", str(recipe), "--out", str(out), "--set", "federation.rounds=2")
    assert done.returncode == 0, done.stderr
    assert "round   2" in done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr == ""
    page = florana("report", str(out), "--out", str(tmp_path / "page.html"), "--json")
    assert page.returncode == 0, page.stderr
    (row,) = json.loads(page.stdout)["runs"]
    assert row["strategy"] == "fedit"
    assert row["rounds"] == 2
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    again = florana("run", str(recipe), "--out", str(out), "--json", "--resume")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rounds"] == 3


def test_dry_run_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    done = florana("run", str(recipe), "--out", str(tmp_path / "none"), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    promised = json.loads(done.stdout)
    assert promised["rounds"] == 3
    assert promised["memory"] > 0
    assert not (tmp_path / "none").exists()
    table = florana("run", str(recipe), "--dry-run")
    assert "bytes per round" in table.stdout


CASES: dict[str, tuple[list[str], int, str]] = {
    "no recipe": (["run", "none.toml"], 2, "there is no recipe none.toml"),
    "wrong key": (["run", "{recipe}", "--set", "train.stepz=3"], 2, "did you mean 'steps'"),
    "wrong strategy": (["run", "{recipe}", "--set", "strategy.name=fedavg"], 2, "there is no strategy 'fedavg'"),
    "wrong option": (["run", "{recipe}", "--fast"], 2, "No such option"),
    "wrong verb": (["rnu"], 2, "did you mean 'run'?"),
    "a verb of others": (["train", "x.toml"], 2, "its name here is 'florana run'"),
    "a verb below": (["export"], 2, "it is 'florana flower export'"),
    "a verb that writes to the terminal": (["\x1b[2Jrun"], 2, "there is no verb '\\x1b[2Jrun'"),
    "a rule of one's own": (
        ["run", "{recipe}", "--set", 'strategy.name="own.py:first"'], 2, "breaks the contract: the order",
    ),
    "taken folder": (["run", "{recipe}", "--out", "{folder}"], 2, "exists already"),
    "missing data": (["run", "{recipe}", "--set", "data.train=/none/x.csv"], 3, "/none/x.csv does not exist"),
    "missing column": (["run", "{recipe}", "--set", "data.text=txt"], 3, "has no column 'txt'"),
    "missing model": (["run", "{recipe}", "--set", "model.base=/none"], 3, "/none"),
    "no such module": (["run", "{recipe}", "--set", 'model.target_modules=["qery"]'], 3, "did you mean 'query'"),
    "hub out of reach": (["run", "{recipe}", "--set", "model.base=some/model"], 3, "could not be loaded"),
    "empty clients": (["run", "{recipe}", "--set", "partition.clients=90"], 3, "fewer clients"),
    "all diverge": (
        ["run", "{recipe}", "--set", "train.learning_rate=1e30", "--set", "train.steps=6"], 4, "usable updates",
    ),
    "no run": (["report", "{folder}"], 3, "is no run folder"),
    "no right to write": (["run", "{recipe}", "--out", "/proc/run"], 4, "could not be made"),
    "merge: no folder": (["merge", "none", "--out", "x"], 3, "none does not exist"),
    "merge: a file": (["merge", "{recipe}", "--out", "x"], 3, "it is a file"),
    "merge: rank 0": (["merge", "none", "--out", "x", "--rank", "0"], 2, "not at least 1"),
    "merge: weights": (["merge", "none", "--out", "x", "--weights", "1,2"], 2, "2 for 1 adapter"),
    "merge: not numbers": (["merge", "none", "--out", "x", "--weights", "1;2"], 2, "--weights 3,1,1"),
    "merge: no out": (["merge", "none", "--out", "{recipe}/x"], 2, "cannot be made"),
    "inspect: no folder": (["inspect", "none"], 3, "none does not exist"),
    "inspect: weights": (["inspect", "none", "--weights", "-1"], 2, "not a non-negative number"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_user_can_cause_ends_with_its_code_a_reason_and_no_traceback(
    case: str, recipe: Path, tmp_path: Path
) -> None:
    arguments, code, words = CASES[case]
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "file").write_text("x")
    (tmp_path / "own.py").write_text("def first(parts, rank): return parts[0].adapter\n")
    filled = [a.format(recipe=recipe, folder=folder) if "{" in a else a for a in arguments]
    done = florana(*filled, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    told = " ".join(done.stderr.split())
    assert words in told
    assert told.lower().count("did you mean") <= 1
    assert "\x1b[2J" not in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "florana-error.log").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["file"]
    if code in (2, 3):
        assert not (tmp_path / "runs").exists(), "something was written"


def test_a_rule_of_ones_own_is_called_by_its_name_while_it_runs(recipe: Path, tmp_path: Path) -> None:
    """Its file's whole path would fill every line."""
    (tmp_path / "own.py").write_text(
        "from florana.aggregate.mean import mean\ndef mine(parts, rank): return mean(parts)\n"
    )
    own = ["--set", 'strategy.name="own.py:mine"', "--set", "federation.rounds=1"]
    done = florana("run", str(recipe), "--out", "o", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mine  round   1" in done.stdout
    assert "own.py" not in done.stdout
    planned = florana("run", str(recipe), "--dry-run", *own, cwd=tmp_path)
    assert "own.py" not in planned.stdout


def test_an_unexpected_failure_is_one_line_and_a_log(tmp_path: Path) -> None:
    script = (
        "import florana.recipe.load as f\n"
        "def broken(*a): raise ZeroDivisionError('oops')\n"
        "f.read_recipe = broken\n"
        "import sys; sys.argv = ['florana', 'run', 'x.toml']\n"
        "from florana.cli.main import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "this is a bug" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ZeroDivisionError: oops" in (tmp_path / "florana-error.log").read_text()


def adapters(folder: Path) -> list[str]:
    names = []
    for u in range(2):
        pair = LoraFactors(B=torch.full((6, 2), 1.0 + u), A=torch.eye(2, 4), scaling=1.5)
        write_adapter(folder / f"site-{u}", Adapter({"layer.q": pair}), AdapterCard("base", None, ("q",)))
        names.append(str(folder / f"site-{u}"))
    return names


def test_merge_and_inspect(tmp_path: Path) -> None:
    folders = adapters(tmp_path)
    done = florana("merge", *folders, "--weights", "3,1", "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    merged = json.loads(done.stdout)
    assert [source["weight"] for source in merged["sources"]] == [0.75, 0.25]
    assert merged["error"] < 1e-6
    product = read_adapter(tmp_path / "out")[0].modules["layer.q"]
    assert torch.allclose(product.scaling * product.B @ product.A, 1.25 * 1.5 * torch.ones(6, 2) @ torch.eye(2, 4))
    plain = florana("merge", *folders, "--out", str(tmp_path / "plain"))
    assert "exact to rounding" in plain.stdout
    looked = florana("inspect", *folders, "--json")
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["overlap"][0][1] == pytest.approx(1.0)
    table = florana("inspect", *folders)
    assert "What a merge would lose" in table.stdout
    assert "site-1" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["merge", "{a}", "--out", "{a}"], 2, "exists already"),
        (["merge", "{a}", "--out", "new", "--weights", "3;1"], 2, "is not a list of numbers"),
        (["merge", "{a}", "none", "--out", "new"], 3, "none does not exist"),
        (["merge", "{a}", "{b}", "--out", "new", "--weights", "1,-1"], 2, "is not a non-negative number"),
        (["merge", "{a}", "{b}", "--out", "new", "--weights", "1,-1"], 2, "say --normalize off"),
        (
            ["merge", "{a}", "{b}", "--out", "new", "--weights", "1,-1", "--normalize", "on"],
            2,
            "cannot be divided by that",
        ),
        (["merge", "{a}", "{b}", "--out", "new", "--normalize", "no"], 2, "on or off"),
        (["inspect", "none"], 3, "none does not exist"),
    ],
)
def test_merging_what_cannot_be_merged(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    a, b = adapters(tmp_path)
    done = florana(*(word.format(a=a, b=b) for word in arguments), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_merge_with_negative_weights_of_other_modules(tmp_path: Path) -> None:
    a, b = adapters(tmp_path)
    pair = LoraFactors(B=torch.zeros(6, 2), A=torch.eye(2, 4), scaling=1.5)
    write_adapter(tmp_path / "dead", Adapter({"layer.v": pair}), AdapterCard("base", None, ("v",)))
    options = ("--weights", "-1,2,2", "--normalize", "off")
    done = florana("merge", a, b, str(tmp_path / "dead"), *options, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "note: dead changes nothing" in done.stdout
    assert "note: dead adapts 1 of 2 modules and adds nothing to the others (layer.q)" in done.stdout
    merged = read_adapter(tmp_path / "out")[0].modules
    product = merged["layer.q"].scaling * merged["layer.q"].B @ merged["layer.q"].A
    assert torch.allclose(product, (-1 + 2 * 2) * 1.5 * torch.ones(6, 2) @ torch.eye(2, 4), atol=1e-6)
    assert not merged["layer.v"].B.any()
    looked = florana("inspect", a, b, *options[:1], "-1,2", *options[2:], "--json")
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["notes"] == []


@pytest.mark.parametrize("verb", [[], ["demo"], ["run"], ["report"], ["merge"], ["inspect"]])
def test_help_shows_an_example_and_loads_nothing_heavy(verb: list[str]) -> None:
    done = florana(*verb, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout or verb == []


def verbs(command: Any, name: str = "") -> dict[str, Any]:
    """The commands that can be called, by what is typed for them."""
    found = {} if hasattr(command, "commands") else {name: command}
    for word, inner in getattr(command, "commands", {}).items():
        found |= verbs(inner, f"{name} {word}".strip())
    return found


VERBS = verbs(typer.main.get_command(app))


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_the_text_of_every_argument_and_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 300)
    shown = CliRunner().invoke(app, [*name.split(), "--help"]).stdout
    words = "".join(shown.replace("│", "").split())
    told = {param.name: getattr(param, "help", None) for param in VERBS[name].params}
    assert [parameter for parameter, text in told.items() if not text] == []
    assert [text for text in told.values() if "".join(text.replace("\\[", "[").split()) not in words] == []


def test_the_version() -> None:
    assert florana("--version").stdout.startswith("florana 0.")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.proximal_mu", "FedProx"),
        ("threads", "default: none"),
        ("model.base", "it must be given"),
        ("data.template", "takes: plain, chat"),
    ],
)
def test_a_key_of_a_recipe_is_explained(key: str, text: str) -> None:
    done = florana("recipe", "--explain", key)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{key}: ")
    assert text in done.stdout


def test_a_key_that_is_not_there_is_named_with_its_section() -> None:
    assert "did you mean train.proximal_mu?" in florana("recipe", "--explain", "proximal_mu").stderr
    assert "did you mean 'train.batch_size'?" in florana("recipe", "--explain", "train.batchsize").stderr
    assert "train.proximal_mu = 0.0" in florana("recipe").stdout


@pytest.mark.parametrize(("name", "ours"), [("fedavg", "fedit"), ("SVD", "best-rank"), ("FLoRA_NA", "flora-na")])
def test_other_tools_names_are_answered_with_ours(name: str, ours: str, tmp_path: Path) -> None:
    done = florana("plan", "llama-2-7b", "--methods", name)
    assert done.returncode == 2
    assert f"'{ours}'" in done.stderr
    merged = florana("merge", "a", "b", "--method", name, "--out", str(tmp_path / "x"))
    assert f"'{ours}'" in merged.stderr
    assert "'stack'" in florana("merge", "a", "b", "--method", "oracle", "--out", str(tmp_path / "x")).stderr


def test_inspect_fits_eighty_columns_and_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = AdapterCard(base_model="my/base", task_type="CAUSAL_LM", target_modules=("q_proj", "v_proj"))
    for index, site in enumerate(("general-hospital-north", "general-hospital-south")):
        torch.manual_seed(index)
        pairs = {
            f"layers.0.self_attn.{name}": LoraFactors(torch.randn(6, 2 + index), torch.randn(2 + index, 5), 0.5)
            for name in ("q_proj", "v_proj")
        }
        write_adapter(tmp_path / site, Adapter(pairs), card)
    monkeypatch.setenv("COLUMNS", "80")
    done = florana("inspect", "general-hospital-north", "general-hospital-south", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for text in ("general-hospital-north", "base model: my/base", "task: CAUSAL_LM", "modules: 2 (q_proj, v_proj)"):
        assert text in done.stdout
