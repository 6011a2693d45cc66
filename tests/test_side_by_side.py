"""`[engine] workers`: clients side by side give the bytes of one after the other, whatever becomes of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from florana.errors import FloranaError, RecipeError
from florana.federation.local_engine import LocalEngine
from florana.federation.messages import Brief, Failure, Reply
from florana.federation.side_by_side import side_by_side
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.dry_run import plan
from florana.runs.prepared import prepare
from florana.runs.run_folder import locked, read_environment
from florana.runs.setup import execute
from florana.study.grid import plan_of
from florana.study.runner import threads_of
from tests.deployment import environment

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no process can be forked"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="nor one that has a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def recipe_of(table: dict[str, Any], workers: int, **changes: Any) -> Recipe:
    made = {
        **table,
        "threads": 1,
        "engine": {"workers": workers},
        "partition": {"kind": "iid", "clients": 5},
        **changes,
    }
    return check(made, "t")


def contents(folder: Path) -> dict[str, bytes]:
    """The checkpoints and the adapter; the journal's lines hold seconds."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("adapter", "checkpoint")
        for path in sorted((folder / part).rglob("*.safetensors"))
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": {"name": "flora-na"}, "model": {"dropout": 0.2}},
        {"strategy": {"name": "fedsa-lora"}},  # every client keeps its own B
        {"strategy": {"name": "best-rank"}, "federation": {"uplink": "int8", "clients_per_round": 3}},  # and remainders
    ],
    ids=["dropout", "what stays", "remainders"],
)
def test_the_bytes_are_those_of_one_process(
    changes: dict[str, Any], recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    changes = {name: {**recipe_table.get(name, {}), **change} for name, change in changes.items()}
    if changes["strategy"]["name"] != recipe_table["strategy"]["name"]:
        changes["strategy"] = {"name": changes["strategy"]["name"]}
    steps: dict[int, list[str]] = {1: [], 3: []}
    for workers in (1, 3):
        told = steps[workers]
        execute(recipe_of(recipe_table, workers, **changes), tmp_path / str(workers), step=told.append)
    one, three = contents(tmp_path / "1"), contents(tmp_path / "3")
    assert one.keys() == three.keys()
    assert [name for name in one if one[name] != three[name]] == []
    assert sorted(steps[1]) == sorted(steps[3])
    assert read_environment(tmp_path / "3")["workers"] == 3


def brief(client: str, round_: int) -> Brief:
    return Brief(round_, client, 1, b"p", False, ["A"], ["A"], {})


def told(fit: Callable[[Brief, Mapping[str, Tensor]], Any], clients: str, round_: int = 2, workers: int = 2) -> Any:
    engine = LocalEngine(fit, {}, lambda asked: side_by_side(workers, lambda step: fit, lambda client: None, asked))
    return list(engine.fit([brief(client, round_) for client in clients])), engine.memories()


def reply(brief: Brief) -> Reply:
    return Reply(brief.client, brief.round, 1, {}, brief.client.encode(), 0.0)


def test_answers_come_in_order_with_their_memories_and_the_next_round_gets_them() -> None:
    def fit(brief: Brief, memory: Mapping[str, Tensor]) -> Any:
        time.sleep(0.2 if brief.client == "a" else 0.0)
        count = memory.get("count", torch.zeros((), dtype=torch.bfloat16)) + 1
        return reply(brief), {"count": count, "view": torch.arange(6.0).reshape(2, 3).T} if brief.client != "c" else {}

    engine = LocalEngine(fit, {}, lambda asked: side_by_side(3, lambda step: fit, lambda client: None, asked))
    for round_ in (1, 2):
        answers = list(engine.fit([brief(client, round_) for client in "abcd"]))
        assert [answer.client for answer in answers] == list("abcd")
    kept = engine.memories()
    assert {client: float(memory["count"]) for client, memory in kept.items()} == {"a": 2.0, "b": 2.0, "d": 2.0}
    assert kept["a"]["count"].dtype == torch.bfloat16
    assert torch.equal(kept["a"]["view"], torch.arange(6.0).reshape(2, 3).T)


def test_what_a_client_raises_is_told_as_if_it_were_alone() -> None:
    def fit(brief: Brief, memory: Mapping[str, Tensor]) -> Any:
        if brief.client == "b":
            raise FloranaError("the training loss became nan", fix="lower it")
        if brief.client == "c":
            raise IndexError("out of range")
        return reply(brief), {}

    answers, _ = told(fit, "abcd")
    assert [type(answer) for answer in answers] == [Reply, Failure, Failure, Reply]
    assert answers[1].reason == "the training loss became nan; fix: lower it"
    assert "IndexError: out of range" in answers[2].reason
    with pytest.raises(RuntimeError, match="IndexError: out of range") as caught:
        told(fit, "ac", round_=1)
    assert any("in fit" in note for note in caught.value.__notes__), "the worker's traceback is there"


def test_a_process_that_is_killed_costs_its_client_and_no_other() -> None:
    def fit(brief: Brief, memory: Mapping[str, Tensor]) -> Any:
        if brief.client == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return reply(brief), {}

    answers, _ = told(fit, "abcde")
    assert [answer.client for answer in answers if isinstance(answer, Reply)] == list("acde")
    assert "ended by itself: is there memory for so many?" in answers[1].reason

    def all_die(brief: Brief, memory: Mapping[str, Tensor]) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    answers, _ = told(all_die, "abcde")
    assert len(answers) == 5
    assert all(isinstance(answer, Failure) for answer in answers)


def test_a_killed_run_leaves_no_lock_and_no_process(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """What a worker inherits, it closes; and it ends when nobody listens."""
    recipe_table["train"] = {"steps": 500, "batch_size": 8}
    recipe = recipe_of(recipe_table, 2)
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    command = [sys.executable, "-m", "florana", "run", "r.toml", "--out", "run"]
    run = subprocess.Popen(command, cwd=tmp_path, env={**environment(tmp_path / "h")}, stdout=subprocess.DEVNULL)

    def workers() -> list[psutil.Process]:
        return psutil.Process(run.pid).children()

    end = time.monotonic() + 300
    while len(crew := workers()) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    run.kill()
    run.wait()
    with locked(tmp_path / "run"):  # at once: the workers, which still train, hold nothing
        pass
    _, alive = psutil.wait_procs(crew, timeout=60)
    assert alive == [], "a worker outlived its run"


def test_what_does_not_go_together_is_refused_and_the_plan_knows_of_it(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    for change in ({"threads": 2}, {"model": {**recipe_table["model"], "device": "auto"}}):
        with pytest.raises(RecipeError, match=r"engine\.workers above 1 needs model\.device = 'cpu' and threads = 1"):
            check({**recipe_table, "engine": {"workers": 2}, **change}, "t")
    begun = check({**recipe_table, "threads": 2}, "t")
    execute(begun, tmp_path / "run", until=1)
    anywhere = {name: section for name, section in recipe_table.items() if name != "threads"}
    go_on = check({**anywhere, "engine": {"workers": 2}}, "t")
    assert threads_of(plan_of(go_on), tmp_path / "a study", 1) == 1
    with pytest.raises(RecipeError, match="began with 2 threads"):
        execute(go_on, tmp_path / "run", resume=True)
    alone = recipe_of(recipe_table, 1)
    execute(alone, tmp_path / "alone", until=1)
    execute(recipe_of(recipe_table, 3), tmp_path / "alone", resume=True)
    assert plan(recipe_of(recipe_table, 3), prepare(alone)).seconds > 0
