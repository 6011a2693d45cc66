"""GLUE: every task from files of both layouts, its labels checked, its metrics against formulas written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from florana.errors import InputError, RecipeError
from florana.federation.journal import read_records
from florana.recipe.load import check
from florana.recipe.schema import Data, Recipe
from florana.report.views import headline, summary, views
from florana.runs.prepared import prepare
from florana.runs.setup import execute, global_scores
from florana.score.glue import GLUE, glue_label
from florana.train.client import train_locally
from florana.train.data.partition import binned
from florana.train.data.sources import load_tables
from florana.train.data.tokenize import collate
from florana.train.evaluate import class_figures, correlations
from tests.conftest import SHARED, WORDS

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

BINARY = sorted(name for name, task in GLUE.items() if len(task.labels) == 2)


def write(path: Path, name: str, labels: list[Any], *, tsv: bool = False) -> Path:
    """A small file of a task: as the hub has it (jsonl), or with the header of GLUE's own tsv."""
    task = GLUE[name]
    text, label = (task.tsv or task.columns) if tsv else task.columns
    rows = [
        {**{c: f"{WORDS[i % 20]} {WORDS[(3 * i + k) % 20]}" for k, c in enumerate(text)}, label: value, "idx": i}
        for i, value in enumerate(labels)
    ]
    if tsv:
        lines = ["\t".join(rows[0])] + ["\t".join(str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cycle(name: str, count: int) -> list[Any]:
    classes = len(GLUE[name].labels)
    return [i % classes if classes else round(5 * i / (count - 1), 3) for i in range(count)]


def table_for(name: str, base: Path, folder: Path, **data: Any) -> dict[str, Any]:
    return {
        "task": "sequence-classification" if GLUE[name].labels else "sequence-regression",
        "seed": 1,
        "model": {"base": str(base), "target_modules": ["query", "value"], "rank": 2, "alpha": 6},
        "data": {
            "glue": name,
            "train": str(write(folder / "train.jsonl", name, cycle(name, 60))),
            "test": str(write(folder / "dev.jsonl", name, cycle(name, 12))),
            "max_length": 16,
            **data,
        },
        "partition": {"kind": "dirichlet", "clients": 3, "alpha": 1.0},
        "train": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
        "federation": {"rounds": 2},
        "strategy": {"name": "fedit"},
    }


@pytest.mark.parametrize("name", GLUE)
def test_every_task_runs_from_files_with_its_own_metrics(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    more = {}
    if name == "mnli":
        more["test_mismatched"] = str(write(tmp_path / "mm.jsonl", name, cycle(name, 9)))
    recipe = check(table_for(name, tiny_bert, tmp_path, **more), "r")
    execute(recipe, tmp_path / "run")
    scores = read_records(tmp_path / "run" / "rounds.jsonl")[-1].eval
    assert set(GLUE[name].metrics) <= set(scores["global"])
    (row,) = summary(views([tmp_path / "run"]))
    assert row["metric"] == GLUE[name].metrics[0] == headline(recipe.model_dump())
    assert row["global"] == scores["global"][row["metric"]]
    setup = json.loads((tmp_path / "run" / "setup.json").read_text())
    assert setup["labels"] == list(GLUE[name].labels or binned([0.0, 5.0], 5)[1])
    assert sum(sum(c["per_label"]) for c in setup["clients"].values()) == sum(
        c["train"] for c in setup["clients"].values()
    )


@pytest.mark.parametrize("name", [name for name, task in GLUE.items() if task.tsv is not None])
def test_glues_own_files_give_the_hubs_rows(name: str, tmp_path: Path) -> None:
    """The two layouts may be mixed: a training file of one, a test file of the other."""
    labels: list[Any] = cycle(name, 8)
    words = [GLUE[name].labels[label] for label in labels] if GLUE[name].labels else labels
    hub = write(tmp_path / "a.jsonl", name, labels)
    own = write(tmp_path / "b.tsv", name, words, tsv=True)
    data = Data.model_validate({"glue": name, "train": str(hub), "test": str(own)})
    tables = load_tables(data, "sequence-classification" if GLUE[name].labels else "sequence-regression", 0)
    for column in (*GLUE[name].columns[0], GLUE[name].columns[1]):
        assert list(tables.train[column]) == list(tables.test[column])
    assert tables.labels == GLUE[name].labels


@pytest.mark.shared
def test_the_real_files_of_mrpc_and_sst2() -> None:
    """408 and 872 rows: GLUE's own validation sets; MRPC's training file has column names of its own."""
    mrpc = {"train": str(SHARED / "mrpc" / "train.json"), "test": str(SHARED / "mrpc" / "glue_dev.tsv")}
    tables = load_tables(
        Data.model_validate({"glue": "mrpc", "text": ["text_a", "text_b"], **mrpc}), "sequence-classification", 0
    )
    assert (len(tables.train), len(tables.test)) == (3300, 408)
    assert sum(tables.test["label"]) == 279  # the share of paraphrases that GLUE's validation set is known for
    assert tables.test[0]["text_a"].startswith("He said the foodservice pie business")
    sst2 = {"train": str(SHARED / "sst2" / "train.tsv"), "test": str(SHARED / "sst2" / "dev.tsv")}
    tables = load_tables(Data.model_validate({"glue": "sst2", **sst2}), "sequence-classification", 0)
    assert (len(tables.train), len(tables.test), sum(tables.test["label"])) == (67349, 872, 444)


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("rte", [0, 1, -1], "row 3, column 'label': the label is -1: GLUE's test split comes without labels"),
        ("stsb", [0.0, -1.0], "the label is -1"),
        ("rte", [0, 1, 2], "the label is 2; the labels of 'rte' are 0 (entailment), 1 (not_entailment)"),
        ("mnli", [0, 3], "2 (contradiction)"),
        ("sst2", ["good", "bad"], "the label is 'good'"),
        ("cola", [0, 0.5], "the label is 0.5"),
        ("stsb", [0.0, 5.1], "the scores of 'stsb' go from 0 to 5"),
        ("stsb", ["high", "low"], "the label is 'high'"),
        ("qnli", [True, False], "the label is True"),
    ],
)
def test_labels_that_are_none_of_the_tasks_are_refused(
    name: str, labels: list[Any], words: str, tmp_path: Path
) -> None:
    path = str(write(tmp_path / "x.jsonl", name, labels))
    with pytest.raises(InputError) as caught:
        load_tables(Data.model_validate({"glue": name, "train": path, "test": path}), "sequence-classification", 0)
    assert words in str(caught.value)
    assert "x.jsonl, row" in str(caught.value)


def test_files_without_the_tasks_columns_are_refused(tmp_path: Path) -> None:
    good = str(write(tmp_path / "good.jsonl", "mrpc", [0, 1]))

    def message(rows: list[dict[str, Any]], **data: Any) -> str:
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = Data.model_validate({"glue": "mrpc", "train": good, "test": str(tmp_path / "bad.jsonl"), **data})
        with pytest.raises(InputError) as caught:
            load_tables(given, "sequence-classification", 0)
        return str(caught.value)

    assert "no column 'sentence2', which GLUE's 'mrpc' needs" in message([{"sentence1": "a", "label": 1}])
    unlabelled = message([{"sentence1": "a", "sentence2": "b"}])
    assert "no column 'label'" in unlabelled
    assert "GLUE's test split comes without labels" in unlabelled
    assert "data.text and data.label name columns of your own" in message([{"left": "a", "right": "b", "label": 1}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"glue": "mrcp"}}, "'mrpc'"),
        ({"data": {"glue": "stsb"}}, "data.glue = 'stsb' needs task = 'sequence-regression'"),
        ({"data": {"glue": "rte"}, "task": "sequence-regression"}, "needs task = 'sequence-classification'"),
        ({"data": {"glue": "rte"}, "task": "causal-lm"}, "needs task = 'sequence-classification'"),
        ({"data": {"glue": "rte", "test_mismatched": "x.tsv"}}, "of data.glue = 'mnli' alone"),
        ({"data": {"train": "x.csv"}, "task": "sequence-regression"}, "needs the column with the score"),
        ({"partition": {"kind": "dirichlet", "clients": 2, "bins": 1}}, "greater than or equal to 2"),
    ],
)
def test_recipes_that_cannot_hold(change: dict[str, Any], words: str) -> None:
    table: dict[str, Any] = {
        "task": "sequence-classification",
        "model": {"base": "some/model"},
        "data": {"glue": "rte"},
        "partition": {"kind": "dirichlet", "clients": 2},
        "train": {"steps": 1},
        "strategy": {"name": "fedit"},
    }
    with pytest.raises(RecipeError) as caught:
        check(table | change, "r.toml")
    assert words in str(caught.value)


def test_a_task_by_name_alone_comes_from_the_hub_and_the_resolved_recipe_says_so() -> None:
    data = Data.model_validate({"glue": "mnli"})
    assert (data.train, data.test, data.hub_config) == ("nyu-mll/glue", "nyu-mll/glue", "mnli")
    assert (data.train_split, data.test_split, data.test_mismatched) == (
        "train", "validation_matched", "nyu-mll/glue",
    )  # fmt: skip
    assert (data.text, data.label) == (["premise", "hypothesis"], "label")
    assert Data.model_validate(data.model_dump(exclude_none=True)) == data
    own = Data.model_validate({"glue": "mnli", "train": "x.tsv", "text": ["a", "b"]})
    assert (own.test, own.test_mismatched, own.text, own.label) == (None, None, ["a", "b"], "label")


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_f1_and_matthews_are_those_of_the_counts(pairs: list[tuple[int, int]]) -> None:
    """Of the second class, from true and false positives and negatives, undefined ones 0."""
    truth = [t for t, _ in pairs]
    logits = torch.tensor([[1.0 - p, float(p)] for _, p in pairs])
    tp, fp = sum(t & p for t, p in pairs), sum((1 - t) & p for t, p in pairs)
    fn, tn = sum(t & (1 - p) for t, p in pairs), sum((1 - t) & (1 - p) for t, p in pairs)
    found = class_figures(truth, logits)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / below if below else 0.0)
    assert found["accuracy"] == pytest.approx((tp + tn) / len(pairs))


def ranks(values: list[float]) -> np.ndarray[Any, Any]:
    """Mean ranks, ties shared."""
    array = np.asarray(values)
    return np.array([(np.sum(array < v) + np.sum(array <= v) + 1) / 2 for v in array])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-9, 9)), min_size=2, max_size=30))
def test_pearson_and_spearman_against_their_formulas(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [b / 3 for _, b in pairs]
    found = correlations(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert found == {"pearson": 0.0, "spearman": 0.0}
        return
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert found["spearman"] == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-9)


@pytest.fixture
def regression(tiny_bert: Path, tmp_path: Path) -> Recipe:
    return check(table_for("stsb", tiny_bert, tmp_path), "r")


def test_a_score_is_learnt_by_the_mean_squared_error_of_one_output(regression: Recipe) -> None:
    setup = prepare(regression)
    assert setup.head["classifier.weight"].shape == (1, 16)
    setup.bench.load(setup.start)
    batch = collate(setup.common, 0, torch.device("cpu"))
    setup.bench.model.eval()
    with torch.no_grad():
        out = setup.bench.forward(batch)
    wanted = np.mean((out.logits[:, 0].double().numpy() - np.array([e.labels[0] for e in setup.common])) ** 2)
    assert float(out.loss) == pytest.approx(wanted, rel=1e-5)
    scores = global_scores(setup, setup.start, None, 5)
    assert scores["loss"] == pytest.approx(wanted, rel=1e-5)
    assert set(scores) == {"pearson", "spearman", "loss"}
    rows = setup.clients["client-0"].train
    before = train_locally(setup.bench, rows, regression.train, 0, lambda: None)
    many = regression.train.model_copy(update={"steps": 30})
    train_locally(setup.bench, rows, many, 0, lambda: None)
    assert train_locally(setup.bench, rows, regression.train, 0, lambda: None) < before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["stsb", "rte"])
def test_heads_are_learnt_in_float32_on_a_half_precision_base(
    dtype: str, name: str, tiny_bert: Path, tmp_path: Path
) -> None:
    table = table_for(name, tiny_bert, tmp_path)
    table["model"]["dtype"] = dtype
    regression = check(table, "r")
    setup = prepare(regression)
    setup.bench.load(setup.start)
    assert {p.dtype for p in setup.bench.trainable} == {torch.float32}
    assert train_locally(setup.bench, setup.clients["client-0"].train, regression.train, 0, lambda: None) > 0


def test_scores_are_dealt_out_by_bins_of_equal_width(regression: Recipe) -> None:
    assert binned([2.0, 2.0], 5) == ([0, 0], ("2",))
    assert binned([-2.0, 6.0, -0.1, 0.0, 5.9], 4) == ([0, 3, 0, 1, 3], ("-2 to 0", "0 to 2", "2 to 4", "4 to 6"))
    bins, names = binned([0.0, 1.2, 2.4, 3.6, 4.99, 5.0], 5)
    assert bins == [0, 1, 2, 3, 4, 4]
    assert names == ("0 to 1", "1 to 2", "2 to 3", "3 to 4", "4 to 5")
    by_bin = regression.partition.model_copy(update={"kind": "pathological", "classes": 1, "clients": 5, "holdout": 0})
    setup = prepare(regression.model_copy(update={"partition": by_bin}))
    held = [{int(min(row.labels[0], 4.999)) for row in data.train} for data in setup.clients.values()]
    assert sorted(map(sorted, held)) == [[0], [1], [2], [3], [4]]


def test_a_score_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,1.5\nNA,high\n")
    data = Data(train=str(path), test=str(path), label="label")
    with pytest.raises(InputError, match=r"x\.csv, row 2: 'high' in column 'label' is no finite number"):
        load_tables(data, "sequence-regression", 0)
    path.write_text("text,label\nNA,1.5\nnull,2\n")
    tables = load_tables(data, "sequence-regression", 0)
    assert list(tables.train["text"]) == ["NA", "null"], "words that pandas would take for missing"
    assert list(tables.train["label"]) == [1.5, 2.0]


def test_mismatched_figures_are_those_of_the_second_set(tiny_bert: Path, tmp_path: Path) -> None:
    """The same file as both sets gives the same figures twice; another file gives others."""
    same = table_for("mnli", tiny_bert, tmp_path)
    same["data"]["test_mismatched"] = same["data"]["test"]
    setup = prepare(check(same, "r"))
    scores = global_scores(setup, setup.start, None, 8)
    assert scores["accuracy_mismatched"] == scores["accuracy"]
    assert scores["loss_mismatched"] == scores["loss"]
    same["data"]["test_mismatched"] = str(write(tmp_path / "mm.jsonl", "mnli", [2, 2, 2]))
    other = global_scores(prepare(check(same, "r")), setup.start, None, 8)
    assert other["accuracy"] == scores["accuracy"]
    assert other["loss_mismatched"] != scores["loss_mismatched"]


def test_binary_labels_follow_the_tables_order_whatever_the_file_begins_with() -> None:
    for name in BINARY:
        for index, label in enumerate(GLUE[name].labels):
            assert glue_label(name, label) == glue_label(name, str(index)) == glue_label(name, index) == index


def test_the_hub_is_asked_for_the_tasks_own_configuration_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network here: what would be asked is recorded, and rows of the hub's columns are given."""
    asked = []

    def load(name: str, config: str, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        task = GLUE[config]
        rows = cycle(config, 6)
        return datasets.Dataset.from_dict(
            {**{column: [f"a {i}" for i in range(6)] for column in task.columns[0]}, task.columns[1]: rows}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name, task in GLUE.items():
        asked.clear()
        tables = load_tables(
            Data.model_validate({"glue": name}),
            "sequence-classification" if task.labels else "sequence-regression",
            0,
        )
        splits = ["train", task.test, *([task.mismatched] if task.mismatched else [])]
        assert asked == [("nyu-mll/glue", name, split) for split in splits]
        assert list(tables.more) == (["mismatched"] if name == "mnli" else [])
        assert list(tables.test[task.columns[1]]) == cycle(name, 6)
