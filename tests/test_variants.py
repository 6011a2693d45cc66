"""LoRA variants in training: DoRA against its formula, targets by pattern, ranks and alphas of single modules, PEFT."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from florana.adapters.adapter_folder import read_adapter
from florana.aggregate.best_rank.project import best_rank
from florana.aggregate.best_rank.truncate import by_budget, by_rank, divided
from florana.aggregate.heterogeneous import padded
from florana.errors import InputError, RecipeError
from florana.federation.journal import Journal
from florana.federation.loop import run_rounds
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.recipe.load import check, read_recipe
from florana.recipe.schema import Recipe
from florana.report.page import write_report
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import Setup, prepare
from florana.runs.setup import begin, engine_of, execute, federation_of, global_scores
from florana.strategy import STRATEGIES
from florana.strategy.base import Outcome, State
from florana.study.grid import plan_of, recipe_of
from florana.train.client import train_locally
from florana.train.model import Workbench
from tests import oracle
from tests.cases import dense
from tests.test_run import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SHORT: dict[str, Any] = {"federation": {"rounds": 2, "clients_per_round": 2}, "evaluate": {"personal_limit": 8}}
MOVES = {"flora", "fedex-lora", "frlora", "florist", "oracle"}
"""Methods that add a frozen part beside the LoRA factors: none goes with DoRA."""


def made(table: dict[str, Any], **sections: Any) -> Recipe:
    table = copy.deepcopy(table)
    for name, change in sections.items():
        table[name] = {**table.get(name, {}), **change} if isinstance(change, dict) else change
    return check(table, "test")


def outputs(recipe: Recipe, adapter: Path, rows: Sequence[Any]) -> torch.Tensor:
    """The logits of the adapter's folder as PEFT alone loads it, row by row."""
    base = AutoModelForSequenceClassification.from_pretrained(recipe.model.base, num_labels=2)
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return torch.stack([loaded(input_ids=torch.tensor([row.ids])).logits[0] for row in rows])


def own_outputs(setup: Setup, folder: Path) -> torch.Tensor:
    """The logits of the run's last server state, on the run's own bench."""
    last, _ = Journal(folder, setup.bench.card).recover()
    assert last is not None
    setup.bench.load(last.state.adapter, last.state.residual)
    setup.bench.model.eval()
    with torch.no_grad():
        return torch.stack([setup.bench.model(input_ids=torch.tensor([row.ids])).logits[0] for row in setup.common])


def assert_peft_gives_the_runs_outputs(recipe: Recipe, setup: Setup, folder: Path) -> None:
    own = own_outputs(setup, folder)
    assert torch.allclose(outputs(recipe, folder / "adapter", setup.common), own, atol=1e-5)
    setup.bench.load(setup.start)
    setup.bench.model.eval()
    with torch.no_grad():
        before = setup.bench.model(input_ids=torch.tensor([setup.common[0].ids])).logits[0]
    assert not torch.allclose(before, own[0], atol=1e-4), "the run changed nothing"


def test_dora_is_the_formula_on_dense_weights(recipe_table: dict[str, Any]) -> None:
    """W' = m (W + s B A) / || each row of W + s B A ||, put into a plain model, gives the bench's outputs."""
    recipe = made(recipe_table, model={"variant": "dora"})
    setup = prepare(recipe)
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: LoraFactors(torch.randn(pair.B.shape, generator=generator), pair.A, pair.scaling)
        for name, pair in setup.start.modules.items()
    }
    extra = {
        name: tensor * (0.5 + torch.rand(tensor.shape, generator=generator)) if "magnitude" in name else tensor
        for name, tensor in setup.start.extra.items()
    }
    setup.bench.load(Adapter(modules, extra))
    setup.bench.model.eval()
    base = AutoModelForSequenceClassification.from_pretrained(recipe.model.base, num_labels=2).eval()
    with torch.no_grad():
        base.classifier.weight.copy_(extra["classifier.weight"])
        base.classifier.bias.copy_(extra["classifier.bias"])
        for name, pair in modules.items():
            weight = base.get_submodule(name).weight
            moved = weight.double().numpy() + pair.scaling * pair.B.double().numpy() @ pair.A.double().numpy()
            length = extra[f"{name}.lora_magnitude_vector"].double().numpy()
            row = moved / np.linalg.norm(moved, axis=1, keepdims=True) * length[:, None]
            weight.copy_(torch.from_numpy(row).float())
        for example in setup.common[:6]:
            ids = torch.tensor([example.ids])
            assert torch.allclose(setup.bench.model(input_ids=ids).logits, base(input_ids=ids).logits, atol=2e-5)


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - MOVES))
def test_every_method_that_leaves_the_base_trains_dora_and_peft_loads_it(
    name: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = made(recipe_table, model={"variant": "dora"}, strategy=SMALL.get(name, {"name": name}), **SHORT)
    setup = prepare(recipe)
    result = execute(recipe, tmp_path / "run", setup=setup)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    last, _ = Journal(tmp_path / "run", setup.bench.card).recover()
    assert last is not None
    vectors = [n for n in last.state.adapter.extra if n.endswith("lora_magnitude_vector")]
    assert len(vectors) == len(setup.start.modules)
    assert all(not torch.equal(last.state.adapter.extra[n], setup.start.extra[n]) for n in vectors)
    if "global" not in result.records[-1].eval:
        return  # no model of the server's
    assert_peft_gives_the_runs_outputs(recipe, setup, tmp_path / "run")
    with pytest.raises(InputError, match="'use_dora' is on"):
        read_adapter(tmp_path / "run" / "adapter")
    page = write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    assert "magnitudes averaged with the clients&#39; weights; the aggregation error is that of B A alone" in page


def test_magnitudes_are_averaged_with_the_clients_weights(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = made(recipe_table, model={"variant": "dora"}, federation={"rounds": 1})
    setup = prepare(recipe)
    strategy = strategy_of(recipe, sorted(setup.clients))
    seen: list[Contribution] = []

    def watched(state: State, parts: Sequence[Contribution]) -> Outcome:
        seen.extend(parts)
        return strategy.step(state, parts)

    begun = strategy.init(begin(recipe, setup, strategy))
    end = run_rounds(
        dataclasses.replace(strategy, step=watched),
        begun,
        engine_of(recipe, setup, begun),
        federation_of(recipe, setup, sorted(setup.clients), setup.examples),
        Journal(tmp_path, setup.bench.card),
        lambda event: None,
    )
    assert len({part.weight for part in seen}) > 1, "unequal weights"
    for name in (n for n in begun.adapter.extra if "magnitude" in n):
        total = sum(part.weight for part in seen)
        mean = sum(part.weight / total * part.adapter.extra[name].double().numpy() for part in seen)
        assert np.allclose(end.adapter.extra[name].numpy(), mean, atol=1e-6)
        assert end.adapter.extra[name].shape == (begun.adapter.modules[name.rpartition(".")[0]].shape[0],)


@pytest.mark.parametrize(
    "strategy",
    [*({"name": name} for name in sorted(MOVES)), {"name": "best-rank", "broadcast_rank": 5}],
    ids=str,
)
def test_methods_that_move_the_base_are_refused_with_the_reason(
    strategy: dict[str, Any], recipe_table: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as caught:
        made(recipe_table, model={"variant": "dora"}, strategy=strategy)
    text = str(caught.value)
    assert f"'{strategy['name']}' does not go with model.variant = 'dora'" in text
    assert "divides by the norm of W + scaling B A" in text


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"magnitude": "personal"}, "model.magnitude is of model.variant = 'dora'"),
        ({"variant": "dora", "magnitude": "personal"}, "does not go with model.head = 'average'"),
        ({"variant": "dora", "head": "personal"}, "does not go with model.head = 'personal'"),
        ({"variant": "dora", "magnitude": "mean"}, "'average' or 'personal'"),
        ({"target_modules": "query("}, "'query(' in [model] is not a regular expression"),
        ({"target_modules": []}, "model.target_modules is empty"),
        ({"rank_pattern": {"qu[": 4}}, "is not a regular expression"),
        ({"rank_pattern": {"query": 0}}, "greater than or equal to 1"),
        ({"alpha_pattern": {"query": -1}}, "greater than 0"),
        ({"rank_pattern": {"query": 2}, "rank": 4, "client_ranks": [2]}, "client_ranks does not go with"),
    ],
)
def test_model_settings_that_cannot_hold(model: dict[str, Any], words: str, recipe_table: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        made(recipe_table, model=model)
    assert words in str(caught.value)


def test_personal_magnitudes_stay_with_the_clients(tiny_llama: Path, tmp_path: Path) -> None:
    """A language model has no head: its magnitudes alone are kept, and there is no global figure then."""
    rows = "".join(json.dumps({"text": f"good film {i} bad plot"}) + "\n" for i in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    table = {
        "task": "causal-lm",
        "model": {
            "base": str(tiny_llama), "target_modules": ["q_proj"], "rank": 2, "variant": "dora",
            "magnitude": "personal",
        },
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32},
        "partition": {"kind": "iid", "clients": 2},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "federation": {"rounds": 2},
        "strategy": {"name": "fedit"},
    }  # fmt: skip
    recipe = check(table, "r")
    result = execute(recipe, tmp_path / "run")
    assert set(result.records[-1].eval) == {"personal", "clients_on_common"}
    last, _ = Journal(tmp_path / "run", prepare(recipe).bench.card).recover()
    assert last is not None
    assert not last.state.adapter.extra
    kept = [last.memories[client] for client in sorted(last.memories)]
    assert len(kept) == 2
    assert all(all(n.endswith("lora_magnitude_vector") for n in own) and own for own in kept)
    assert any(not torch.equal(kept[0][n], kept[1][n]) for n in kept[0])


def test_a_study_keeps_local_only_personal_and_names_the_control_that_cannot_be(recipe_table: dict[str, Any]) -> None:
    table = {**recipe_table, "model": {**recipe_table["model"], "variant": "dora"}}
    table["study"] = {"methods": ["best-rank"], "seeds": 1, "controls": ["centralised", "local-only"]}
    plan = plan_of(check(table, "t"))
    local = next(recipe_of(plan.base, cell) for cell in plan.cells if cell.method.label == "local-only")
    assert (local.model.head, local.model.magnitude) == ("personal", "personal")
    table["study"]["controls"] = ["oracle"]
    with pytest.raises(RecipeError, match=r"oracle.*does not go with model\.variant"):
        plan_of(check(table, "t"))
    table["model"] |= {"rank_pattern": {"query": 3}}
    table["study"] |= {"controls": [], "ranks": [2, 4]}
    with pytest.raises(RecipeError, match="ranks are compared, but"):
        plan_of(check(table, "t"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_magnitudes_are_trained_in_float32_on_a_half_precision_base(dtype: str, recipe_table: dict[str, Any]) -> None:
    recipe = made(recipe_table, model={"variant": "dora", "dtype": dtype})
    setup = prepare(recipe)
    setup.bench.load(setup.start)
    assert {p.dtype for p in setup.bench.trainable} == {torch.float32}
    assert train_locally(setup.bench, setup.clients["client-0"].train, recipe.train, 0, lambda: None) > 0


PATTERN = {"rank": 4, "alpha": 6, "rank_pattern": {"value": 2, r"0\.output\.dense": 3}, "alpha_pattern": {"query": 10}}


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"ravan"}))
def test_every_module_keeps_its_rank_and_its_scaling(name: str, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = made(recipe_table, model=PATTERN, strategy={"name": name}, **SHORT)
    setup = prepare(recipe)
    wanted = {
        module: (
            2 if module.endswith("value") else 3 if module.endswith("0.output.dense") else 4,
            10 if module.endswith("query") else 6,
        )
        for module in setup.start.modules
    }
    assert {rank for rank, _ in wanted.values()} == {2, 3, 4}
    result = execute(recipe, tmp_path / "run", setup=setup)
    last, _ = Journal(tmp_path / "run", setup.bench.card).recover()
    assert last is not None
    for module, (rank, alpha) in wanted.items():
        pair = last.state.adapter.modules[module]
        assert pair.rank == rank or (name == "florist" and pair.rank < rank), module  # as few as hold the energy
        assert pair.scaling == pytest.approx(alpha / rank)
    if "global" in result.records[-1].eval:
        assert_peft_gives_the_runs_outputs(recipe, setup, tmp_path / "run")
    if name == "best-rank":
        for figures in result.records[-1].error["per_module"].values():
            assert figures["error"] == pytest.approx(figures["optimum"], abs=1e-6)


def test_methods_that_are_told_one_rank_are_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from florana.aggregate.mean import mean\ndef rule(parts, rank):\n    return mean(parts)\n"
    )
    for strategy in ({"name": "ravan"}, {"name": f"{tmp_path}/own.py:rule"}):
        with pytest.raises(RecipeError, match=r"does not go with model\.rank_pattern"):
            made(recipe_table, model=PATTERN, strategy=strategy)


def contributions(ranks: dict[str, int]) -> list[Contribution]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (7, 12), "v": (9, 5)}
    return [
        Contribution(
            client,
            Adapter(
                {
                    name: LoraFactors(
                        torch.randn(out, ranks[name], generator=generator),
                        torch.randn(ranks[name], into, generator=generator),
                        1.5,
                    )
                    for name, (out, into) in shapes.items()
                }
            ),
            weight,
        )
        for client, weight in (("a", 3.0), ("b", 1.0))
    ]


def truth(parts: Sequence[Contribution], name: str) -> np.ndarray[Any, Any]:
    total = sum(part.weight for part in parts)
    return np.sum([part.weight / total * dense(part.adapter, name) for part in parts], axis=0)


def test_rules_take_each_modules_own_rank() -> None:
    """Each module at its own rank is what the rule gives for that module alone at that rank, by a dense SVD."""
    ranks = {"q": 2, "v": 1}
    parts = contributions(ranks)
    answer = best_rank(parts, ranks)
    found = divided(parts, ranks, by_rank({"q": 3, "v": 1}), keep=None)
    assert found.residual is not None
    assert found.rest is not None
    assert set(found.residual.modules) == {"q"}
    for name, rank in ranks.items():
        whole = truth(parts, name)
        best = oracle.best_rank(whole, rank)
        for adapter in (answer, found.adapter):
            assert adapter.modules[name].rank == rank
            assert np.allclose(dense(adapter, name), best, atol=1e-5)
        rest = dense(found.adapter, name) + dense(found.rest, name)
        rest = rest + (dense(found.residual, name) if name in found.residual.modules else 0)
        assert np.allclose(rest, whole, atol=1e-5)
    carried = [dataclasses.replace(part, residual=Adapter(dict(parts[0].adapter.modules))) for part in parts]
    assert {n: p.rank for n, p in best_rank(carried, ranks).modules.items()} == ranks
    with pytest.raises(InputError, match="the rank 0 is not at least 1"):
        best_rank(parts, {"q": 0, "v": 2})
    assert {n: p.rank for n, p in padded(parts[0].adapter, {"q": 4, "v": 1}).modules.items()} == {"q": 4, "v": 1}
    with pytest.raises(InputError, match="module 'v' has rank 1, which cannot be padded to 0"):
        padded(parts[0].adapter, {"q": 2, "v": 0})


def test_a_budget_begins_after_each_modules_own_rank() -> None:
    from florana.lora import linalg

    wholes = {
        "q": linalg.Decomposition(torch.eye(3), torch.tensor([9.0, 8.0, 7.0]), torch.eye(3)),
        "v": linalg.Decomposition(torch.eye(3), torch.tensor([3.0, 2.0, 1.0]), torch.eye(3)),
    }
    assert by_budget(24, {"q": 1, "v": 2})(wholes) == {"q": 2, "v": 2}  # 18 are spent, one term of 6 is left
    assert by_budget(18, {"q": 1, "v": 2})(wholes) == {"q": 1, "v": 2}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (r".*layer\.0\..*(query|value)", 2),
        (["attention.output.dense"], 2),
        (r"encoder\.layer\.\d\.intermediate\.dense", None),
        ("all-linear", 13),
    ],
)
def test_targets_by_list_pattern_or_all_are_written_so_that_peft_finds_them(
    targets: str | list[str], count: int | None, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    if count is None:  # whole names must match: BERT's begin with `bert.` under a classifier
        with pytest.raises(InputError, match="matches the pattern"):
            prepare(made(recipe_table, model={"target_modules": targets}))
        return
    recipe = made(recipe_table, model={"target_modules": targets, "rslora": True}, federation={"rounds": 1})
    setup = prepare(recipe)
    assert len(setup.start.modules) == count
    execute(recipe, tmp_path / "run", setup=setup)
    assert_peft_gives_the_runs_outputs(recipe, setup, tmp_path / "run")
    adapter, card = read_adapter(tmp_path / "run" / "adapter")
    assert set(adapter.modules) == set(setup.start.modules)
    assert card.rslora


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"rank_pattern": {"valeu": 4}}, "did you mean 'value'"),
        ({"alpha_pattern": {"key": 4}}, "model.alpha_pattern: 'key' matches no adapted module"),
        ({"target_modules": ".*qury"}, "matches the pattern '.*qury'"),
    ],
)
def test_patterns_that_match_nothing_are_named(model: dict[str, Any], words: str, recipe_table: dict[str, Any]) -> None:
    recipe = made(recipe_table, model=model)
    with pytest.raises(InputError) as caught:
        Workbench(recipe.model, recipe.task, ("0", "1"), 0)
    assert words in str(caught.value)


def test_patterns_survive_the_recipes_own_toml(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = made(recipe_table, model=PATTERN)
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    assert read_recipe(tmp_path / "r.toml") == recipe


def test_dora_on_a_language_model_is_loaded_by_peft(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"film {i} plot"}) + "\n" for i in range(12)))
    table = {
        "task": "causal-lm",
        "model": {"base": str(tiny_llama), "rank": 2, "alpha": 6, "variant": "dora", "rslora": True},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32},
        "partition": {"kind": "iid", "clients": 2},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 0.02},
        "federation": {"rounds": 2},
        "strategy": {"name": "best-rank"},
    }
    recipe = check(table, "r")
    setup = prepare(recipe)
    result = execute(recipe, tmp_path / "run", setup=setup)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    total, count = 0.0, 0
    for row in setup.common:
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor([row.ids])).logits[0].double()
        total -= float(torch.log_softmax(logits[:-1], -1).gather(-1, torch.tensor(row.ids[1:])[:, None]).sum())
        count += len(row.ids) - 1
    assert total / count == pytest.approx(result.records[-1].eval["global"]["loss"], rel=1e-5)
    assert total / count < global_scores(setup, setup.start, None, 8)["loss"]
