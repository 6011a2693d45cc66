"""The number of threads is part of what a run is: recorded, kept when it is resumed, the same for a whole federation.

Most runs here work with one thread and are asked with more: two on a busy machine wait for each other.
"""

from __future__ import annotations

import json
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from florana.errors import InputError, RecipeError
from florana.federation.event import Event
from florana.lora.factors import Adapter
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.prepared import prepare
from florana.runs.rounds import settled
from florana.runs.run_folder import recorded_threads
from florana.runs.setup import execute
from florana.runs.threads import VARIABLES, instructions, threads
from florana.study.grid import plan_of
from florana.study.runner import Group, execute_study, finished, folder_of, swap_file, threads_of
from tests.program import florana

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

WEIGHTS = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def table(recipe_table: dict[str, Any]) -> dict[str, Any]:
    """A recipe that names no number."""
    recipe_table.pop("threads")
    recipe_table["evaluate"] = {"personal": "never"}
    recipe_table["partition"] = {"kind": "iid", "clients": 2}
    recipe_table["federation"] = {}
    recipe_table["train"]["steps"] = 1
    return recipe_table


def rounds(table: dict[str, Any], count: int, **more: Any) -> Recipe:
    return check({**table, "federation": {**table["federation"], "rounds": count}, **more}, "t")


def taken(recipe: Recipe, folder: Path, **named: Any) -> tuple[set[int], list[str]]:
    """The numbers of threads that a run's steps took, and what was said when it was resumed."""
    seen: set[int] = set()
    said: list[Event] = []
    before = torch.get_num_threads()
    execute(recipe, folder, step=lambda client: seen.add(torch.get_num_threads()), show=said.append, **named)
    assert torch.get_num_threads() == before, "the caller's number is put back"
    return seen, [event.detail for event in said if event.kind == "resumed"]


def test_the_number_is_taken_inside_and_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 2):
        assert torch.get_num_threads() == before + 2
        with threads(None):
            assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), threads(before + 2):
        raise KeyError
    assert torch.get_num_threads() == before


def test_a_new_run_takes_this_processs_number_and_a_resumed_one_its_own(table: dict[str, Any], tmp_path: Path) -> None:
    with threads(1):
        whole = taken(rounds(table, 2), tmp_path / "whole")
        assert taken(rounds(table, 1), tmp_path / "halved") == whole == ({1}, [])
    assert tomllib.loads((tmp_path / "halved" / "recipe.toml").read_text())["threads"] == 1
    assert json.loads((tmp_path / "halved" / "environment.json").read_text())["torch_threads"] == 1
    with threads(3):
        seen, said = taken(rounds(table, 2), tmp_path / "halved", resume=True)
    assert seen == {1}
    assert said == ["threads 1, as it began (this process would take 3)"]
    assert (tmp_path / "halved" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_the_recipes_number_comes_first_and_stays(table: dict[str, Any], tmp_path: Path) -> None:
    with threads(3):
        assert taken(rounds(table, 1, threads=1), tmp_path / "run") == ({1}, [])
        with pytest.raises(RecipeError, match="threads: 1 -> 3"):
            execute(rounds(table, 2, threads=3), tmp_path / "run", resume=True)
        assert taken(rounds(table, 2, threads=1), tmp_path / "run", resume=True) == ({1}, [])
        again = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
        execute(check(again, "t"), tmp_path / "again")  # the resolved recipe runs again, to the same bytes
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "run" / WEIGHTS).read_bytes()
    with pytest.raises(RecipeError, match="threads"):
        rounds(table, 1, threads=0)


def older(folder: Path, **changes: Any) -> None:
    """The folder as florana wrote it before recipes named a number of threads."""
    recipe = tomllib.loads((folder / "recipe.toml").read_text())
    recipe.pop("threads")
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    environment = json.loads((folder / "environment.json").read_text()) | changes
    (folder / "environment.json").write_text(json.dumps(environment))


def test_an_older_folder_has_its_number_beside_the_versions(table: dict[str, Any], tmp_path: Path) -> None:
    with threads(1):
        taken(rounds(table, 1), tmp_path / "run")
    older(tmp_path / "run")
    assert recorded_threads(tmp_path / "run") == 1
    with threads(3):
        assert taken(rounds(table, 2), tmp_path / "run", resume=True)[0] == {1}
    older(tmp_path / "run", torch_threads="two")
    assert recorded_threads(tmp_path / "run") is None
    (tmp_path / "run" / "environment.json").write_text("{")
    with pytest.raises(InputError, match=r"environment\.json cannot be read"):
        recorded_threads(tmp_path / "run")
    assert recorded_threads(tmp_path / "nothing") is None


def test_variables_that_choose_other_sums_stand_beside_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    alone = instructions()
    assert alone == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    assert instructions() == f"{alone} MKL_CBWR=COMPATIBLE OMP_THREAD_LIMIT=1"


def test_what_a_resumed_run_has_otherwise_is_said(table: dict[str, Any], tmp_path: Path) -> None:
    taken(rounds(table, 1), tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    began = json.loads(path.read_text())
    path.write_text(json.dumps(began | {"instructions": "NEON", "versions": began["versions"] | {"torch": "1.0"}}))
    _, said = taken(rounds(table, 2), tmp_path / "run", resume=True)
    assert [line.split(":")[0] for line in said] == [
        f"instructions NEON -> {began['instructions']}",
        f"torch 1.0 -> {began['versions']['torch']}",
    ]
    path.write_text("[]")
    with pytest.raises(InputError, match="it is no table"):
        taken(rounds(table, 3), tmp_path / "run", resume=True)
    path.unlink()  # of no vital kind: without it a run goes on
    assert taken(rounds(table, 3), tmp_path / "run", resume=True)[1] == []


def test_a_program_gives_the_bytes_of_this_process_whatever_number_it_would_take(
    table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = rounds(table, 2, threads=2)
    execute(recipe, tmp_path / "here")
    (tmp_path / "r.toml").write_text(rounds(table, 2).to_toml())
    run = ("run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "there"))
    done = florana(*run, "--set", "threads=2", "--set", "federation.rounds=1")  # one thread: see tests/conftest.py
    assert (done.returncode, "threads 2\n" in done.stdout) == (0, True), done.stdout + done.stderr
    done = florana(*run, "--resume")
    assert done.returncode == 0, done.stderr
    assert "threads 2, as it began (this process would take 1)" in " ".join(done.stdout.split())
    assert (tmp_path / "there" / WEIGHTS).read_bytes() == (tmp_path / "here" / WEIGHTS).read_bytes()
    done = florana(*run, "--resume", "--set", "threads=1")
    assert (done.returncode, "threads: 2 -> 1" in done.stderr) == (2, True)


def test_a_setup_does_not_depend_on_the_number(table: dict[str, Any]) -> None:
    """One is prepared before a resumed run's number is known, and shared by the runs of a study."""

    def start(count: int) -> Adapter:
        with threads(count):
            return prepare(rounds(table, 1)).start

    one, three = (start(count).tensors() for count in (1, 3))
    assert all(torch.equal(tensor, three[name]) for name, tensor in one.items())


def test_a_study_keeps_one_number_for_all_its_runs(table: dict[str, Any], tmp_path: Path) -> None:
    table["study"] = {"methods": ["fedit"], "seeds": 1, "controls": ["oracle"]}
    plan, out = plan_of(rounds(table, 1)), tmp_path / "study"
    assert threads_of(plan_of(rounds(table, 1, threads=5)), out, 1) == 5, "the recipe's own number"
    with threads(1):
        assert execute_study(plan, out, 1, lambda count, name: None) == {}
    with threads(3):
        assert threads_of(plan, out, 1) == 1, "as the study was begun"
        longer = plan_of(rounds(table, 2))
        assert execute_study(longer, out, 1, lambda count, name: None) == {}
    numbers = {
        json.loads((folder_of(out, cell) / "environment.json").read_text())["torch_threads"] for cell in plan.cells
    }
    assert numbers == {1}
    assert {json.loads(swap_file(out, setting).read_text())["threads"] for setting in plan.settings} == {1}
    group = Group(longer.base, longer.settings[0], longer.cells[:2], out, 3, ())
    assert all(finished(group, cell) for cell in group.cells)
    (folder_of(out, group.cells[0]) / "recipe.toml").unlink()
    assert not finished(group, group.cells[0])


def test_a_site_says_its_number_and_takes_it_wherever_it_is_asked(table: dict[str, Any], tmp_path: Path) -> None:
    sites = pytest.importorskip("tests.flower_sites", reason="the extra 'flower' is not installed")
    recipe = rounds(table, 2)
    setup, seen = prepare(recipe), set()
    with threads(2):
        members = {
            name: sites.site_of(recipe, setup, name, tmp_path / "kept", lambda who: seen.add(torch.get_num_threads()))
            for name in setup.clients
        }
    roster = sites.roster_of(members, tmp_path)
    with threads(2):  # the server's own
        events = sites.led(rounds(table, 1), sites.grid_of(members), roster,
                           tmp_path / "run")  # fmt: skip
    assert [event.detail.split("rows, ")[1] for event in events if event.kind == "joined"] == ["threads 2"] * 2
    facts = json.loads((tmp_path / "run" / "setup.json").read_text())
    own = json.loads((tmp_path / "run" / "environment.json").read_text())
    stated = {"threads": 2, "instructions": own["instructions"], "torch": torch.__version__.partition("+")[0]}
    assert facts["computes"] == dict.fromkeys(members, stated)
    members["client-1"] = sites.site_of(recipe, setup, "client-1", tmp_path / "kept")  # comes back with another
    assert members["client-1"].card.threads == 1
    grid = sites.grid_of(members)
    events = sites.led(recipe, grid, roster, tmp_path / "run", resume=True)
    assert next(event.detail for event in events if event.kind == "resumed").startswith("threads 2, as it began")
    joined = {event.client: event.detail for event in events if event.kind == "joined"}
    assert joined["client-0"].endswith("threads 2")
    assert joined["client-1"].endswith("threads 1 (since the run began: threads 2 -> 1: its last bits may differ)")
    assert seen == {2}
    asked = next(frame for node, frame in grid.sent if node == 1 and frame.kind == "train")
    seen.clear()
    other = threading.Thread(target=members["client-0"].answer, args=(asked,))
    other.start()
    other.join()
    assert seen == {2}, "in a thread of Flower's too"


def test_the_number_that_the_operators_recipe_names_holds_for_every_site(table: dict[str, Any], tmp_path: Path) -> None:
    sites = pytest.importorskip("tests.flower_sites", reason="the extra 'flower' is not installed")
    named = rounds(table, 1, threads=2)
    own = rounds(table, 1, threads=1)
    setup = prepare(named)
    members = {name: sites.site_of(named, setup, name, tmp_path / "kept") for name in setup.clients}
    assert {site.card.threads for site in members.values()} == {2}
    roster = sites.roster_of(members, tmp_path)
    sites.led(named, sites.grid_of(members), roster, tmp_path / "run")
    execute(named, tmp_path / "rehearsal")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "rehearsal" / WEIGHTS).read_bytes()
    members["client-1"] = sites.site_of(own, setup, "client-1", tmp_path / "kept")
    events = sites.led(named, sites.grid_of(members), roster, tmp_path / "other")
    refused = {event.client: event.detail for event in events if event.kind == "refused"}
    assert refused == {"client-1": "has another recipe: threads is 1, here 2"}


def test_nothing_is_said_of_a_new_run(table: dict[str, Any], tmp_path: Path) -> None:
    said: list[Event] = []
    with settled(rounds(table, 1), tmp_path, said.append) as recipe:
        assert recipe.threads == torch.get_num_threads()
    assert said == []
