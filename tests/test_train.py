"""Training against a bare PEFT loop, determinism, heads, the frozen residual, partitions, errors of models and data."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification

from florana.errors import FloranaError, InputError, RecipeError
from florana.factors import Adapter, LoraFactors
from florana.federation.sampling import derive
from florana.recipe import Data, Partition, Recipe
from florana.recipe_file import check
from florana.run import Setup, prepare
from florana.train import beginnings
from florana.train.client import TrainingClients, train_locally
from florana.train.data import load_tables
from florana.train.evaluate import evaluate
from florana.train.loading import locate
from florana.train.model import Workbench
from florana.train.partition import deal
from florana.train.tasks import IGNORED, Example, collate, encode_language
from tests import oracle
from tests.cases import dense

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def recipe(recipe_table: dict[str, Any]) -> Recipe:
    return check(recipe_table, "test")


@pytest.fixture
def setup(recipe: Recipe) -> Setup:
    return prepare(recipe)


def test_local_training_is_the_bare_peft_loop_bit_for_bit(recipe: Recipe, setup: Setup) -> None:
    """The same steps written with nothing but torch, transformers and peft give the same tensors."""
    rows = setup.clients["client-0"].train
    setup.bench.load(setup.start)
    train_locally(setup.bench, rows, recipe.train, 11, lambda: None)
    ours = setup.bench.adapter()

    with torch.random.fork_rng():
        torch.manual_seed(derive(recipe.seed, "model"))
        base = AutoModelForSequenceClassification.from_pretrained(recipe.model.base, num_labels=2)
        model = get_peft_model(
            base,
            LoraConfig(
                task_type=TaskType.SEQ_CLS,
                r=2,
                lora_alpha=6,
                lora_dropout=0.0,
                target_modules=["query", "value", "output.dense"],
            ),
        )
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
        order = np.random.default_rng(11).permutation(len(rows)).tolist()
        torch.manual_seed(11)
        for _ in range(3):
            chosen, order = order[:8], order[8:]
            batch = collate([rows[i] for i in chosen], 0, torch.device("cpu"))
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    state = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    for name, pair in ours.modules.items():
        assert torch.equal(pair.A, state[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(pair.B, state[f"base_model.model.{name}.lora_B.weight"])
    assert len(state) == 2 * len(ours.modules) + len(ours.extra)
    assert any(float(pair.B.abs().max()) > 0 for pair in ours.modules.values())


def test_training_depends_on_the_seed_and_on_nothing_before_it(recipe: Recipe, setup: Setup) -> None:
    rows = setup.clients["client-1"].train

    def train(seed: int) -> Adapter:
        setup.bench.load(setup.start)
        train_locally(setup.bench, rows, recipe.train, seed, lambda: None)
        return setup.bench.adapter()

    torch.manual_seed(5)
    first = train(1)
    before = torch.get_rng_state()
    other, again = train(2), train(1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"
    assert all(torch.equal(t, again.tensors()[n]) for n, t in first.tensors().items())
    assert any(not torch.equal(t, other.tensors()[n]) for n, t in first.tensors().items())


def test_a_frozen_residual_acts_as_if_it_were_in_the_base(recipe: Recipe, setup: Setup) -> None:
    generator = torch.Generator().manual_seed(0)
    residual = Adapter(
        {
            name: LoraFactors(
                B=torch.randn(pair.shape[0], 3, generator=generator),
                A=torch.randn(3, pair.shape[1], generator=generator),
                scaling=pair.scaling,
            )
            for name, pair in setup.start.modules.items()
        }
    )
    setup.bench.load(setup.start, residual)
    with_residual = evaluate(setup.bench, setup.common, 16)
    setup.bench.load(setup.start, None)
    without = evaluate(setup.bench, setup.common, 16)
    for name, pair in residual.modules.items():
        weight = setup.bench.model.get_submodule(f"base_model.model.{name}").base_layer.weight
        with torch.no_grad():
            weight += pair.scaling * pair.B @ pair.A
    merged = evaluate(setup.bench, setup.common, 16)
    assert merged["loss"] == pytest.approx(with_residual["loss"], abs=2e-6)
    assert abs(without["loss"] - merged["loss"]) > 1e-4


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (2, 3)])
def test_cores_act_as_the_matrices_between_the_fixed_factors(heads: int, size: int, setup: Setup) -> None:
    """The model with cores in it is the model with their dense update in its base weights, scales included."""
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: LoraFactors(
            torch.randn(pair.shape[0], heads * size, generator=generator),
            torch.randn(heads * size, pair.shape[1], generator=generator),
            0.5,
        )
        for name, pair in setup.start.modules.items()
    }
    cores = {name: torch.randn(heads, size, size, generator=generator) for name in drawn}
    adapter = Adapter(drawn, setup.start.extra, cores)
    setup.bench.load(adapter, None, ["core", "scale"])
    with torch.no_grad():
        for core in setup.bench._cores.values():
            core.scale.copy_(torch.arange(1.0, heads + 1))
    scaled = {name: core * torch.arange(1.0, heads + 1)[:, None, None] for name, core in cores.items()}
    assert all(torch.allclose(core, scaled[name]) for name, core in setup.bench.adapter().cores.items())
    shapes = sorted(tuple(p.shape) for p in setup.bench.trainable)
    assert shapes == sorted(
        [
            *([(heads, size, size)] * len(cores)),
            *([(heads,)] * len(cores)),
            *(tuple(t.shape) for t in setup.head.values()),
        ]
    )
    with_cores = evaluate(setup.bench, setup.common, 16)
    setup.bench.load(setup.start)
    without = evaluate(setup.bench, setup.common, 16)
    weights = setup.bench.weights()
    with torch.no_grad():
        for name, pair in drawn.items():
            change = pair.scaling * pair.B @ torch.block_diag(*scaled[name]) @ pair.A
            weights[name][0].add_(change.T if weights[name][1] else change)
    merged = evaluate(setup.bench, setup.common, 16)
    with torch.no_grad():
        for name, pair in drawn.items():
            change = pair.scaling * pair.B @ torch.block_diag(*scaled[name]) @ pair.A
            weights[name][0].sub_(change.T if weights[name][1] else change)
    assert merged["loss"] == pytest.approx(with_cores["loss"], abs=1e-5)
    assert abs(without["loss"] - merged["loss"]) > 1e-4


@pytest.mark.parametrize("trains", [["A"], ["B"], ["A", "B"]])
def test_only_what_is_asked_for_is_trained(trains: list[str], recipe: Recipe, setup: Setup) -> None:
    generator = torch.Generator().manual_seed(2)
    moved = {  # a rank other than the recipe's, and a B that is not zero
        name: LoraFactors(
            0.1 * torch.randn(pair.shape[0], 3, generator=generator),
            torch.randn(3, pair.shape[1], generator=generator),
            2.0,
        )
        for name, pair in setup.start.modules.items()
    }
    adapter = Adapter(moved, setup.start.extra)
    setup.bench.load(adapter, None, trains)
    train_locally(setup.bench, setup.clients["client-0"].train, recipe.train, 3, lambda: None)
    after = setup.bench.adapter()
    for name, pair in after.modules.items():
        assert torch.equal(pair.A, moved[name].A) == ("A" not in trains), name
        assert torch.equal(pair.B, moved[name].B) == ("B" not in trains), name
        assert pair.scaling == 2.0
    assert not any(torch.equal(t, setup.start.extra[n]) for n, t in after.extra.items())


def test_principal_pairs_are_the_best_low_rank_part_of_the_base_weights(setup: Setup) -> None:
    pairs = beginnings.principal(setup.bench, setup.start)
    for name, (weight, transposed) in setup.bench.weights().items():
        matrix = weight.detach().double().numpy()
        matrix = matrix.T if transposed else matrix
        pair = pairs.modules[name]
        best = oracle.best_rank(matrix, pair.rank)
        assert np.linalg.norm(dense(pairs, name) - best) <= 1e-5 * np.linalg.norm(best)
        assert pair.scaling == setup.start.modules[name].scaling
        assert torch.allclose(pair.A.norm(), pair.B.norm(), rtol=1e-4)


def test_gradient_pairs_span_the_sign_of_the_pooled_gradient(setup: Setup) -> None:
    """Against autograd on the merged base weights, all clients' rows in one batch; the base stays frozen after."""
    batches = {client: data.train[:2] for client, data in setup.clients.items()}
    rows = [row for _, own in sorted(batches.items()) for row in own]
    pairs = beginnings.gradient(setup.bench, setup.start, batches)
    weights = setup.bench.weights()
    assert not any(weight.requires_grad for weight, _ in weights.values())
    setup.bench.load(setup.start)
    setup.bench.model.eval()
    name, (weight, transposed) = next(iter(weights.items()))
    weight.requires_grad_(True)
    setup.bench.forward(collate(rows, 0, torch.device("cpu"))).loss.backward()
    assert weight.grad is not None
    gradient = weight.grad.double().numpy()
    weight.requires_grad_(False)
    weight.grad = None
    setup.bench.model.zero_grad(set_to_none=True)
    best = oracle.best_rank(-np.sign(gradient.T if transposed else gradient), pairs.modules[name].rank)
    assert np.linalg.norm(dense(pairs, name) - best) <= 0.05 * np.linalg.norm(best)  # signs of tiny values may differ


def test_a_quantised_base_has_no_principal_pairs(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(setup.start.modules))
    stored = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    monkeypatch.setattr(setup.bench, "weights", lambda: {name: (stored, False)})
    with pytest.raises(InputError, match=r"stored as torch\.int8"):
        beginnings.principal(setup.bench, setup.start)


@pytest.mark.parametrize("head", ["average", "personal"])
def test_the_head_policy_decides_what_is_sent_and_what_is_kept(head: str, recipe_table: dict[str, Any]) -> None:
    from florana.federation.messages import Brief, pack, unpack

    recipe_table["model"]["head"] = head
    recipe = check(recipe_table, "test")
    setup = prepare(recipe)
    first = Adapter(setup.start.modules, setup.head)
    clients = TrainingClients(setup.bench, first, setup.clients, setup.common, recipe.train, recipe.evaluate, head)
    brief = Brief(1, "client-0", 5, pack(setup.start), True, ["A", "B"], ["A", "B"], setup.start.scalings)
    reply, kept = clients.fit(brief, {})
    answer, _ = unpack(reply.payload, setup.start, {}, setup.start.scalings)
    heads = {"classifier.weight", "classifier.bias"}
    assert set(answer.extra) == (heads if head == "average" else set())
    assert set(kept) == ({f"extra/{name}" for name in heads} if head == "personal" else set())
    # another client in between must leave no trace: the first one's round is the same again
    clients.fit(dataclasses.replace(brief, client="client-1"), {})
    again, kept_again = clients.fit(brief, {})
    assert again.payload == reply.payload
    assert all(torch.equal(kept[n], kept_again[n]) for n in kept)
    if head == "personal":
        later, _ = clients.fit(brief, kept)
        assert later.payload != reply.payload, "the client's own head was not used"
    assert {"personal/accuracy", "clients_on_common/accuracy", "train_loss"} <= set(reply.metrics)


def test_scores_are_those_of_scikit_learn_on_the_models_own_predictions(setup: Setup) -> None:
    setup.bench.load(setup.start)
    scores = evaluate(setup.bench, setup.common, 7)
    truth, predicted, losses = [], [], []
    for example in setup.common:
        batch = collate([example], 0, torch.device("cpu"))
        labels = batch.pop("labels")
        with torch.no_grad():
            out = setup.bench.model.eval()(**batch).logits
        truth.append(int(labels))
        predicted.append(int(out.argmax()))
        losses.append(float(torch.nn.functional.cross_entropy(out, labels)))
    assert scores["accuracy"] == accuracy_score(truth, predicted)
    assert scores["macro_f1"] == f1_score(truth, predicted, average="macro", zero_division=0.0)
    assert scores["matthews"] == pytest.approx(matthews_corrcoef(truth, predicted))
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


class Letters:
    """A tokenizer of letters: a is 10, b is 11, and so on."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 87 for letter in text]}


def test_language_examples_predict_the_answer_only_and_always_something() -> None:
    (plain,) = encode_language([("abc",)], Letters(), 10)
    assert plain.ids == (1, 10, 11, 12, 2)
    assert plain.labels == (IGNORED, 10, 11, 12, 2)
    (pair,) = encode_language([("ab", "cd")], Letters(), 10)
    assert pair.ids == (1, 10, 11, 12, 13, 2)
    assert pair.labels == (IGNORED, IGNORED, IGNORED, 12, 13, 2)
    (long,) = encode_language([("abcdefgh", "xyz")], Letters(), 7)
    assert long.ids == (1, 15, 16, 17, 33, 34, 35)  # the prompt keeps its end, the answer its beginning
    assert long.labels == (IGNORED,) * 4 + (33, 34, 35)


def test_a_text_without_anything_to_predict_is_refused() -> None:
    class NoEnds(Letters):
        bos_token_id, eos_token_id = None, None  # type: ignore[assignment]

    with pytest.raises(InputError, match="text 1 has no token to predict"):
        encode_language([("abc",), ("a",)], NoEnds(), 10)


TABLE = datasets.Dataset.from_dict(
    {
        "text": [f"row {i}" for i in range(200)],
        "label": [i % 4 for i in range(200)],
        "site": [f"s{i % 3}" for i in range(200)],
    }
)
KINDS: dict[str, dict[str, Any]] = {
    "iid": {"clients": 5},
    "dirichlet": {"clients": 5, "alpha": 0.5},
    "pathological": {"clients": 4, "classes": 2},
    "column": {"by": "site"},
    "length": {"clients": 5},
    "linear": {"clients": 5},
    "square": {"clients": 4},
    "exponential": {"clients": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_goes_to_exactly_one_client_and_the_deal_is_a_function_of_the_seed(kind: str) -> None:
    settings = Partition(kind=kind, holdout=0.2, **KINDS[kind])
    lengths = [(7 * i) % 50 for i in range(200)]

    def hand_out(seed: int) -> dict[str, Any]:
        return deal(TABLE, settings, "label", lengths, seed)

    shares = hand_out(3)
    rows = [row for share in shares.values() for row in (*share.train, *share.test)]
    assert sorted(rows) == list(range(200))
    assert hand_out(3) == shares
    assert hand_out(4) != shares
    assert len(shares) == (3 if kind == "column" else KINDS[kind]["clients"])
    if kind == "column":
        for share in shares.values():
            assert len({TABLE[row]["site"] for row in share.train}) == 1
    if kind == "length":
        spans = [
            (min(lengths[r] for r in s.train + s.test), max(lengths[r] for r in s.train + s.test))
            for s in shares.values()
        ]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    if kind == "pathological":
        assert all(len({TABLE[row]["label"] for row in (*s.train, *s.test)}) == 2 for s in shares.values())
    if kind in ("linear", "square", "exponential"):
        sizes = [len(s.train) for s in shares.values()]
        assert max(sizes) > 1.5 * min(sizes)
    if kind == "iid":
        assert all(len({TABLE[row]["label"] for row in s.train}) == 4 for s in shares.values())


def test_too_many_clients_are_an_error_that_says_what_to_change() -> None:
    with pytest.raises(InputError) as caught:
        deal(TABLE, Partition(kind="iid", clients=150), "label", [1] * 200, 0)
    assert "partition.smallest" in str(caught.value)
    with pytest.raises(InputError) as caught:
        deal(TABLE, Partition(kind="dirichlet", clients=60, alpha=0.01, smallest=5), "label", [1] * 200, 0)
    assert "fewer clients" in str(caught.value)


ROWS = [("good film", "1"), ('a "quoted, bad one', "0"), ("fine", "1"), ("dull", "0")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "json by id", "parquet"])
def test_the_same_rows_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame(ROWS, columns=["text", "label"])
    path = tmp_path / f"rows.{kind.split()[0]}"
    match kind:
        case "csv":
            frame.to_csv(path, index=False)
        case "tsv":
            path.write_text("text\tlabel\n" + "".join(f"{t}\t{c}\n" for t, c in ROWS))
        case "jsonl":
            path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in ROWS))
        case "json":
            path.write_text(json.dumps([{"text": t, "label": c} for t, c in ROWS]))
        case "json by id":
            path.write_text(json.dumps({str(i): {"text": t, "label": c} for i, (t, c) in enumerate(ROWS)}))
        case "parquet":
            frame.to_parquet(path)
    data = Data(train=str(path), test=str(path), label="label")
    tables = load_tables(data, "sequence-classification", 0)
    assert list(tables.train["text"]) == [text for text, _ in ROWS]
    assert list(tables.train["class_index"]) == [1, 0, 1, 0]
    assert tables.labels == ("0", "1")


@pytest.mark.parametrize(
    ("content", "change", "words"),
    [
        ("text,label\na,1\nb,0\n", {"train": "missing.csv"}, "missing.csv does not exist"),
        ("text,label\na,1\nb,0\n", {"text": "txt"}, "has no column 'txt'"),
        ("text,label\na,1\nb,0\n", {"label": "lable"}, "did you mean 'label'"),
        ("text,label\n,1\nb,0\n", {}, "1 of 2 rows have no value in column 'text'"),
        ("text,label\na,1\nb,1\n", {}, "the single label"),
        ("text,label\n", {}, "holds no rows"),
        ("", {}, "cannot be read as csv"),
        ("text,label\na,1\nb,0\n", {"train": "x.docx"}, "the file type '.docx' is not known"),
    ],
)
def test_data_that_cannot_be_used_is_explained(
    content: str, change: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    settings = {"train": str(path), "test": str(path), "label": "label"} | change
    settings["train"] = str(tmp_path / Path(settings["train"]).name)
    with pytest.raises(InputError) as caught:
        load_tables(Data(**settings), "sequence-classification", 0)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_label_of_the_test_set_that_no_training_row_has(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,0\n")
    (tmp_path / "test.csv").write_text("text,label\na,1\nb,2\n")
    data = Data(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), label="label")
    with pytest.raises(InputError, match="the label 2 in column 'label'"):
        load_tables(data, "sequence-classification", 0)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(recipe: Recipe) -> None:
    with pytest.raises(InputError, match="could not be loaded from the hub"):
        load_tables(Data(train="nobody/nothing", label="label"), "sequence-classification", 0)
    settings = recipe.model.model_copy(update={"base": "nobody/nothing"})
    with pytest.raises(InputError, match="'nobody/nothing' could not be loaded"):
        Workbench(settings, "sequence-classification", ("0", "1"), 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"target_modules": ["querry"]}, InputError, "did you mean 'query'"),
        ({"target_modules": ["word_embeddings"]}, InputError, "is no linear layer"),
        ({"base": "package:no_such_package"}, InputError, "no package 'no_such_package' is installed"),
        ({"base": "package:florana/federation"}, InputError, "no model folder lies in that package"),
        ({"device": "cuda"}, RecipeError, "which this machine"),
        ({"device": "auto", "quantization": "4bit"}, RecipeError, "needs a CUDA device"),
    ],
)
def test_models_that_cannot_be_used_are_explained(
    change: dict[str, Any], error: type[FloranaError], words: str, recipe: Recipe
) -> None:
    if torch.cuda.is_available() and error is RecipeError:  # these two refusals are of machines without one
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(error) as caught:
        Workbench(recipe.model.model_copy(update=change), "sequence-classification", ("0", "1"), 0)
    assert words in str(caught.value)


def test_the_demos_encoder_is_found_in_the_package() -> None:
    folder = Path(locate("package:florana/demo/tiny-encoder"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * 2**20


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"rslora": True},
        {"dropout": 0.1},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_model_settings_train_and_keep_the_adapter_in_float32(change: dict[str, Any], recipe: Recipe) -> None:
    bench = Workbench(recipe.model.model_copy(update=change), "sequence-classification", ("0", "1"), 0)
    start = bench.adapter()
    rows = [Example((2, 5 + i, 6, 3), (0,) * 4, (i % 2,)) for i in range(8)]
    loss = train_locally(bench, rows, recipe.train, 0, lambda: None)
    trained = bench.adapter()
    assert loss > 0
    for name, pair in trained.modules.items():
        assert pair.A.dtype == torch.float32
        assert pair.scaling == pytest.approx(6 / (2**0.5 if change.get("rslora") else 2))
        assert not torch.equal(pair.B, start.modules[name].B)


def test_a_diverging_client_says_so(recipe: Recipe, setup: Setup) -> None:
    setup.bench.load(setup.start)
    wild = recipe.train.model_copy(update={"learning_rate": 1e30, "steps": 6, "max_grad_norm": None})
    with pytest.raises(FloranaError, match=r"lower train\.learning_rate"):
        train_locally(setup.bench, setup.clients["client-0"].train, wild, 0, lambda: None)


@pytest.mark.parametrize(
    ("split", "rows"), [("train", [0, 1, 2, 3]), ("train[1:3]", [1, 2]), ("x[:1]", [0]), ("x[2:]", [2, 3])]
)
def test_rows_of_a_file_by_number(split: str, rows: list[int], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(4)))
    data = Data(train=str(path), train_split=split, test=str(path), test_split="test[3:4]")
    tables = load_tables(data, "causal-lm", 0)
    assert list(tables.train["text"]) == [f"row {i}" for i in rows]
    assert list(tables.test["text"]) == ["row 3"]


@pytest.mark.parametrize(
    ("split", "words"),
    [("train[10%:]", "rows are named by number"), ("train[1]", "cannot be read"), ("train[4:9]", "the file has 4")],
)
def test_a_split_of_a_file_that_cannot_be(split: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text\n" + "".join(f"row {i}\n" for i in range(4)))
    with pytest.raises(InputError) as caught:
        load_tables(Data(train=str(path), train_split=split), "causal-lm", 0)
    assert words in str(caught.value)
    assert "x.csv" in str(caught.value)
