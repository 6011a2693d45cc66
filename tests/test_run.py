"""Whole runs with a real (tiny) model: run folder, determinism, resume after real kills, PEFT loads the result."""

from __future__ import annotations

import copy
import json
import signal
import tomllib
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from florana.errors import FederationError, InputError, RecipeError
from florana.federation.journal import read_records
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.dry_run import plan
from florana.runs.prepared import prepare
from florana.runs.run_folder import read_run
from florana.runs.setup import execute, global_scores
from florana.strategy import STRATEGIES
from tests.conftest import ROOT
from tests.program import florana, started

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def made(table: dict[str, Any], **sections: Any) -> Recipe:
    table = copy.deepcopy(table)
    for name, change in sections.items():
        table[name] = {**table.get(name, {}), **change} if isinstance(change, dict) else change
    return check(table, "test")


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


SMALL = {"ravan": {"name": "ravan", "heads": 2, "size": 4}}
"""Options that fit the tiny model's narrowest module."""


@pytest.mark.parametrize(
    "strategy",
    [
        *(SMALL.get(name, {"name": name}) for name in STRATEGIES),
        {"name": "best-rank", "carry_rank": 4, "factorization": "aligned"},
        {"name": "best-rank", "broadcast_rank": 5},
        {"name": "fed-sb", "begin": "gradient"},
        {"name": "fed-sb", "begin": "random"},
    ],
    ids=str,
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    strategy: dict[str, Any], recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """What clients keep and what the server remembers both come back from the checkpoint; training goes somewhere."""
    long = made(recipe_table, strategy=strategy, evaluate={"personal": "every"})
    setup = prepare(long)
    execute(long, tmp_path / "whole", setup=setup)
    short = made(recipe_table, strategy=strategy, evaluate={"personal": "every"}, federation={"rounds": 2})
    execute(short, tmp_path / "halved", setup=setup)
    before = (tmp_path / "halved" / "adapter" / "adapter_model.safetensors").read_bytes()
    execute(long, tmp_path / "halved", resume=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / "adapter" / file).read_bytes() == (
            tmp_path / "halved" / "adapter" / file
        ).read_bytes()
    assert weights(tmp_path / "halved") != before
    whole, halved = (read_records(tmp_path / name / "rounds.jsonl") for name in ("whole", "halved"))
    assert [r.eval["personal"] for r in whole] == [r.eval["personal"] for r in halved]


@pytest.mark.parametrize(
    "name", ["best-rank", "flexlora", "hetlora", "flora", "ffa-lora", "flora-na", "oracle", "florist"]
)
def test_clients_of_unlike_ranks_train_together(name: str, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = made(recipe_table, strategy={"name": name}, model={"rank": 4, "client_ranks": [1, 4, 2]})
    result = execute(recipe, tmp_path / "run")
    alike = execute(made(recipe_table, strategy={"name": name}, model={"rank": 4}), tmp_path / "alike")
    last = result.records[-1]
    assert last.bytes_up < alike.records[-1].bytes_up
    assert last.eval["global"]["loss"] == pytest.approx(alike.records[-1].eval["global"]["loss"], rel=0.5)
    if name in ("oracle", "flora", "ffa-lora"):
        assert last.error["overall"] < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_leaves_the_promised_folder_and_its_adapter_is_the_servers_model(
    strategy: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = made(recipe_table, strategy=SMALL.get(strategy, {"name": strategy}))
    setup = prepare(recipe)
    result = execute(recipe, tmp_path / "run", setup=setup)
    present = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.toml", "environment.json", "setup.json", "rounds.jsonl", "checkpoint", "adapter"} <= present
    assert [record.round for record in result.records] == [1, 2, 3]
    last = result.records[-1]
    assert len(last.clients) == 3
    if strategy == "fedsa-lora":  # no global product, so no global score and no gap
        assert set(last.eval) == {"personal", "clients_on_common"}
        return
    assert {"global", "personal", "clients_on_common", "gap"} == set(last.eval)
    assert last.eval["gap"]["accuracy"] == pytest.approx(
        last.eval["personal"]["accuracy"] - last.eval["global"]["accuracy"]
    )
    # the folder, loaded by PEFT alone on the base model, scores what the server's state scored
    base = AutoModelForSequenceClassification.from_pretrained(recipe.model.base, num_labels=2)
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    correct, loss = 0, 0.0
    for example in setup.common:
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor([example.ids])).logits
        correct += int(logits.argmax()) == example.labels[0]
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(example.labels)))
    assert correct / len(setup.common) == pytest.approx(last.eval["global"]["accuracy"], abs=0.05)
    assert loss / len(setup.common) == pytest.approx(last.eval["global"]["loss"], rel=1e-4)


@pytest.mark.parametrize("head", ["average", "personal"])
def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(
    head: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = made(recipe_table, strategy={"name": "flora-na"}, model={"head": head})
    for name in ("a", "b"):
        execute(recipe, tmp_path / name)
    execute(made(recipe_table, strategy={"name": "flora-na"}, model={"head": head}, seed=4), tmp_path / "c")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / "adapter" / file).read_bytes() == (tmp_path / "b" / "adapter" / file).read_bytes()
    assert weights(tmp_path / "a") != weights(tmp_path / "c")
    if head == "personal":
        last = read_records(tmp_path / "a" / "rounds.jsonl")[-1]
        assert "global" not in last.eval
        assert "personal" in last.eval


def test_strategies_on_one_setup_do_not_disturb_each_other(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    setup = prepare(made(recipe_table))
    for name in ("oracle", "fedit"):
        execute(made(recipe_table, strategy={"name": name}), tmp_path / "shared" / name, setup=setup)
    execute(made(recipe_table, strategy={"name": "fedit"}), tmp_path / "alone")
    assert weights(tmp_path / "shared" / "fedit") == weights(tmp_path / "alone")


@pytest.mark.parametrize("head", ["average", "personal"])
def test_resume_continues_and_may_add_rounds(head: str, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """Personal heads are state of the clients: they must come back with the rounds."""
    model = {"head": head}
    execute(
        made(recipe_table, model=model, federation={"rounds": 4}, evaluate={"personal": "every"}), tmp_path / "four"
    )
    execute(made(recipe_table, model=model, federation={"rounds": 2}, evaluate={"personal": "every"}), tmp_path / "two")
    longer = made(recipe_table, model=model, federation={"rounds": 4}, evaluate={"personal": "every"})
    execute(longer, tmp_path / "two", resume=True)
    assert weights(tmp_path / "two") == weights(tmp_path / "four")
    assert tomllib.loads((tmp_path / "two" / "recipe.toml").read_text())["federation"]["rounds"] == 4
    scores = [[r.eval for r in read_records(tmp_path / name / "rounds.jsonl")] for name in ("two", "four")]
    assert scores[0] == scores[1]


def test_resume_with_another_recipe_names_what_differs(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    execute(made(recipe_table), tmp_path / "run")
    before = weights(tmp_path / "run")
    with pytest.raises(RecipeError, match=r"train\.learning_rate: 0\.01 -> 0\.02"):
        execute(made(recipe_table, train={"learning_rate": 0.02}), tmp_path / "run", resume=True)
    with pytest.raises(RecipeError, match="planned for 3 rounds"):
        execute(made(recipe_table, federation={"rounds": 2}), tmp_path / "run", resume=True)
    with pytest.raises(RecipeError, match="never writes over a run"):
        execute(made(recipe_table), tmp_path / "run")
    assert weights(tmp_path / "run") == before


def test_a_folder_of_something_else_is_left_alone(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not a run folder"):
        execute(made(recipe_table), tmp_path, resume=True)
    with pytest.raises(RecipeError, match="is a file"):
        execute(made(recipe_table), tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_processes_in_one_folder(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    execute(made(recipe_table, federation={"rounds": 1}), tmp_path / "run")
    with filelock.FileLock(tmp_path / "run" / ".lock"), pytest.raises(FederationError, match="another florana"):
        execute(made(recipe_table, federation={"rounds": 2}), tmp_path / "run", resume=True)


def test_clients_that_diverge_are_refused_and_named(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    wild = made(recipe_table, train={"learning_rate": 1e30, "steps": 6})
    with pytest.raises(FederationError) as caught:
        execute(wild, tmp_path / "run")
    assert "the training loss became" in str(caught.value)
    assert "lower train.learning_rate" in str(caught.value)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_sigkill_of_a_real_run_then_resume_gives_the_same_bytes(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """The whole program, killed again and again at some step of a commit, until it is done."""
    recipe = made(
        recipe_table, federation={"rounds": 12}, strategy={"name": "flora-na"}, evaluate={"personal": "never"}
    )
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    execute(recipe, tmp_path / "alone")
    killed, done = tmp_path / "killed", []
    command = ("run", str(tmp_path / "r.toml"), "--out", str(killed), "--resume")
    for step in (4, 11, 30, 52):  # before and after the rename of the first commit; in later ones
        ended = florana(*command, killed_at=(killed, step))
        assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
        done.append(len(read_records(killed / "rounds.jsonl")))
    assert done == sorted(done), "a committed round was lost"
    assert 0 < done[-1] < 12
    assert started(*command).returncode == 0
    assert weights(killed) == weights(tmp_path / "alone")


def test_the_plan_is_true_and_leaves_no_trace(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = made(recipe_table)
    setup = prepare(recipe)
    before = global_scores(setup, setup.start, None, 16)
    promised = plan(recipe, setup)
    result = execute(recipe, tmp_path / "run", setup=setup)
    first = result.records[0]
    assert promised.bytes_up == first.bytes_up
    assert promised.bytes_down == first.bytes_down
    assert promised.trainable_parameters == setup.start.parameters
    assert {c: promised.clients[c] for c in first.clients} == dict(first.examples)
    assert promised.seconds > 0
    assert global_scores(setup, setup.start, None, 16) == before
    assert json.loads(json.dumps(promised.to_json()))["rounds"] == 3


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.toml is missing"):
        read_run(tmp_path)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["sst2-minilm", "gsm8k-tiny-llama"])
def test_the_recipes_run_on_real_data(name: str, tmp_path: Path) -> None:
    """Short rounds of each recipe on the real model and the real data; the figures need the full recipe."""
    from florana.recipe.load import read_recipe

    short = [
        "federation.rounds=2",
        "evaluate.personal=never",
        "data.test_limit=32",
        "data.train_limit=2000",
        "evaluate.every=1",
        f"train.steps={4 if name == 'gsm8k-tiny-llama' else 2}",
        "federation.clients_per_round=2",
    ]
    result = execute(read_recipe(ROOT / "recipes" / f"{name}.toml", short), tmp_path / "run")
    setup = json.loads((tmp_path / "run" / "setup.json").read_text())
    if name == "gsm8k-tiny-llama":  # eight steps are enough for the small model to show it
        assert result.records[-1].eval["global"]["loss"] < setup["start"]["loss"] - 1
    else:
        assert {"accuracy", "macro_f1", "f1", "matthews", "loss"} == set(result.records[-1].eval["global"])
    assert result.records[0].error["optimum"] <= result.records[0].error["overall"] < 1
