"""Local training: the bare PEFT loop bit for bit, from the seed, with the head policy and the frozen parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification

from florana.errors import FloranaError, InputError, RecipeError
from florana.federation.sampling import derive
from florana.lora.factors import Adapter, LoraFactors
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.prepared import Setup, prepare
from florana.train import lora_init
from florana.train.client import TrainingClients, train_locally
from florana.train.data.tokenize import Example, collate
from florana.train.evaluate import evaluate
from florana.train.loading import locate
from florana.train.model import Workbench
from tests import oracle
from tests.cases import dense

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


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
    pairs = lora_init.principal(setup.bench, setup.start)
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
    pairs = lora_init.gradient(setup.bench, setup.start, batches, rate=0.25)
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
    best = oracle.best_rank(-0.25 * np.sign(gradient.T if transposed else gradient), pairs.modules[name].rank)
    assert np.linalg.norm(dense(pairs, name) - best) <= 0.05 * np.linalg.norm(best)  # signs of tiny values may differ


def test_a_quantised_base_has_no_principal_pairs(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(setup.start.modules))
    stored = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    monkeypatch.setattr(setup.bench, "weights", lambda: {name: (stored, False)})
    with pytest.raises(InputError, match=r"stored as torch\.int8"):
        lora_init.principal(setup.bench, setup.start)


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
