"""Sums that are defined and used to be refused: other modules, any weights, mixed types, wrappers' names; and what a
partitioned model leaves, which is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from florana import AdapterCard, mean, stack, weighted_sum
from florana.adapters.adapter_folder import read_adapter, write_adapter
from florana.adapters.headers import WEIGHTS
from florana.adapters.inspect import inspect
from florana.adapters.merge import merge
from florana.adapters.merge_rules import RULES
from florana.adapters.peft_config import CONFIG
from florana.aggregate.best_rank.project import best_rank
from florana.aggregate.flora_na.scalars import mix
from florana.errors import InputError, RecipeError
from florana.lora.factors import Adapter, Contribution, LoraFactors
from tests.cases import dense, make_case
from tests.peft_adapters import PLAIN, base, logits, save_adapter, summed

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def edited(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewritten(folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    path = folder / WEIGHTS
    changed = dict(change(key, tensor) for key, tensor in load_file(path).items())
    save_file({key: tensor.contiguous() for key, tensor in changed.items()}, path)


def saved(kind: str, configs: list[dict[str, Any]], place: Path) -> tuple[list[Path], list[Any]]:
    folders = [place / f"a{u}" for u in range(len(configs))]
    return folders, [save_adapter(kind, c, u + 1, f) for u, (c, f) in enumerate(zip(configs, folders, strict=True))]


def assert_close(kind: str, folder: Path, wanted: Tensor) -> None:
    loaded = PeftModel.from_pretrained(base(kind), folder).eval().double()
    assert (logits(loaded) - wanted).norm() <= 2e-6 * wanted.norm()


OTHER_MODULES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "fewer": ("llama", [PLAIN, {**PLAIN, "targets": [0]}]),
    "none in common": ("llama", [{**PLAIN, "targets": [1]}, {**PLAIN, "targets": [0]}]),
    "heterogeneous ranks": ("gpt2", [{"r": 2, "lora_alpha": 5}, {"r": 4, "lora_alpha": 3, "targets": [1]}]),
    "embedding in one": ("llama", [{**PLAIN, "targets": [0, 2]}, PLAIN]),
    "embedding in the second": ("gpt2", [PLAIN, {**PLAIN, "targets": [0, 2]}]),
    "bias in one, of fewer": ("bert", [{**PLAIN, "lora_bias": True, "targets": [0]}, PLAIN]),
    "head in both": (
        "bert", [{**PLAIN, "modules_to_save": ["$3"]}, {**PLAIN, "targets": [1], "modules_to_save": ["$3"]}],
    ),
    "three": ("llama", [{**PLAIN, "targets": [0]}, {**PLAIN, "targets": [1]}, {**PLAIN, "targets": [0, 3]}]),
}  # fmt: skip


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("name", OTHER_MODULES)
def test_a_module_that_an_adapter_lacks_is_a_zero_update(name: str, method: str, tmp_path: Path) -> None:
    kind, configs = OTHER_MODULES[name]
    folders, models = saved(kind, configs, tmp_path)
    weights = [0.3, 0.7] if len(configs) == 2 else [0.2, 0.5, 0.3]
    rank = sum(config["r"] for config in configs) if method == "best-rank" else None
    if name == "heterogeneous ranks" and method == "fedit":
        with pytest.raises(InputError, match="needs one rank"):
            merge(folders, tmp_path / "out", method=method)
        return
    result = merge(folders, tmp_path / "out", method=method, weights=weights, rank=rank, dtype="float32")
    if method in ("best-rank", "stack") or name == "none in common":
        assert result.error < 1e-6
        assert_close(kind, tmp_path / "out", logits(summed(kind, models, weights)))
    lacking = [source for source in result.sources if source.modules < len(result.modules)]
    assert lacking
    text = (tmp_path / "out" / "README.md").read_text()
    for source in lacking:
        assert any(f"{source.name} adapts {source.modules} of {len(result.modules)} modules" in n for n in result.notes)
        assert f"Note: {source.name} adapts" in text
    looked = inspect(folders, weights=weights)
    assert looked.notes == result.notes
    assert looked.overlap[0][0] == pytest.approx(1.0)
    exact = next(choice for choice in looked.choices if choice.method == "stack")
    assert exact.error < 1e-6


@pytest.mark.parametrize("scope", ["module", "component"])
def test_smaller_ranks_are_padded_for_flora_na_as_in_a_federation(scope: str, tmp_path: Path) -> None:
    case = make_case(5, 2, 2, [(7, 12), (12, 7)])
    other = make_case(6, 2, 4, [(7, 12), (12, 7)]).parts[0].adapter
    small = case.parts[0].adapter
    widened = {}
    for name, pair in small.modules.items():
        B = torch.cat([pair.B, torch.zeros(pair.B.shape[0], 2)], 1)
        widened[name] = LoraFactors(B, torch.cat([pair.A, torch.zeros(2, pair.A.shape[1])]), pair.scaling)
    card = AdapterCard(base_model="base", task_type=None, target_modules=tuple(small.modules))
    for folder, adapter in (("small", small), ("wide", Adapter(widened)), ("other", Adapter(other.modules))):
        write_adapter(tmp_path / folder, Adapter(adapter.modules), card)
    merged = []
    for folder in ("small", "wide"):
        result = merge(
            [tmp_path / folder, tmp_path / "other"], tmp_path / f"out-{folder}", method="flora-na", scope=scope
        )
        assert {own.rank for own in read_adapter(tmp_path / f"out-{folder}")[0].modules.values()} == {4}
        merged.append(result.error)
    assert merged[0] == pytest.approx(merged[1], rel=1e-6)
    best = merge([tmp_path / "small", tmp_path / "other"], tmp_path / "best", method="best-rank")
    assert best.error <= merged[0] * (1 + 1e-6)


def test_a_head_that_one_lacks_is_refused_with_the_reason(tmp_path: Path) -> None:
    folders, _ = saved("bert", [{**PLAIN, "modules_to_save": ["$3"]}, PLAIN], tmp_path)
    with pytest.raises(InputError, match="trained whole") as caught:
        merge(folders, tmp_path / "out")
    assert str(folders[1]) in str(caught.value)


WEIGHTINGS = [[1.0, -0.5], [-1.0, -2.0], [2.0, 3.0], [1.5, -0.5], [0.0, 2.0]]


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("weights", WEIGHTINGS, ids=str)
def test_weights_are_taken_as_they_are(weights: list[float], method: str, tmp_path: Path) -> None:
    """By the model's outputs where the rule is exact; else the error that is told is that of the products."""
    folders, models = saved("llama", [{"r": 3, "lora_alpha": 6}, {"r": 3, "lora_alpha": 7}], tmp_path)
    rank = 6 if method == "best-rank" else None
    result = merge(folders, tmp_path / "out", method=method, weights=weights, normalize="off", rank=rank)
    assert [source.weight for source in result.sources] == weights
    if method in ("best-rank", "stack"):
        assert_close("llama", tmp_path / "out", logits(summed("llama", models, weights)))
    merged, inputs = read_adapter(tmp_path / "out")[0], [read_adapter(folder)[0] for folder in folders]
    missed = whole = 0.0
    for name in merged.modules:
        target = sum(w * dense(part, name) for w, part in zip(weights, inputs, strict=True))
        missed += np.linalg.norm(target - dense(merged, name)) ** 2
        whole += np.linalg.norm(target) ** 2
    assert result.error == pytest.approx(np.sqrt(missed / whole), abs=1e-6)
    if method != "best-rank":
        figures = {c.method: c.error for c in inspect(folders, weights=weights, normalize="off").choices if c.rank != 6}
        assert method == "stack" or figures[method] == pytest.approx(result.error, rel=1e-4)
    assert result.error < {"best-rank": 1e-6, "stack": 1e-6}.get(method, 0.9)


@pytest.mark.parametrize("method", RULES)
def test_an_adapter_and_minus_half_of_itself_is_its_half(method: str, tmp_path: Path) -> None:
    folders, models = saved("bert", [PLAIN], tmp_path)
    result = merge(folders * 2, tmp_path / "out", method=method, weights=[1, -0.5], normalize="off")
    assert result.error < 1e-6
    assert_close("bert", tmp_path / "out", logits(summed("bert", models, [0.5])))
    assert merge(folders * 2, tmp_path / "on", method=method, weights=[3, -1], normalize="on").error < 1e-6
    assert_close("bert", tmp_path / "on", logits(summed("bert", models, [1.0])))
    nothing = merge(folders * 2, tmp_path / "zero", method=method, weights=[1, -1], normalize="off")
    assert nothing.rank >= 3
    assert_close("bert", tmp_path / "zero", logits(base("bert")))


def test_heads_need_weights_of_sum_one(tmp_path: Path) -> None:
    configs = [{**PLAIN, "modules_to_save": ["$3"]}, {**PLAIN, "modules_to_save": ["$3"]}]
    folders, models = saved("bert", configs, tmp_path)
    merge(folders, tmp_path / "out", method="stack", weights=[1.5, -0.5], normalize="off")
    assert_close("bert", tmp_path / "out", logits(summed("bert", models, [1.5, -0.5])))
    with pytest.raises(InputError, match=r"sum to 0\.5"):
        merge(folders, tmp_path / "no", weights=[1, -0.5], normalize="off")
    merge(folders, tmp_path / "on", method="stack", weights=[1, -0.5], normalize="on")
    assert_close("bert", tmp_path / "on", logits(summed("bert", models, [2.0, -1.0])))


def test_an_embeddings_frozen_base_is_not_weighted(tmp_path: Path) -> None:
    folders, models = saved("llama", [{**PLAIN, "targets": [0, 2]}, {**PLAIN, "targets": [0, 2]}], tmp_path)
    assert any(".base_layer." in key for key in load_file(folders[0] / WEIGHTS)), "PEFT saves it"
    merge(folders, tmp_path / "out", method="stack", weights=[1, -0.5], normalize="off")
    assert_close("llama", tmp_path / "out", logits(summed("llama", models, [1, -0.5])))


@pytest.mark.parametrize(
    ("weights", "normalize", "words"),
    [
        ([1.0, -0.5], None, "--normalize off"),
        ([1.0, -1.0], "on", "grow without bound"),
        ([0.1 + 0.2, -0.3], "on", "grow without bound"),
        ([1.0, -2.0], "on", "every sign would turn"),
        ([0.0, -0.0], "off", "all --weights are zero"),
        ([1.0, float("inf")], "off", "not a finite number"),
        ([1e308, 1e308], "on", "too large"),
        ([1.0, 2.0], "no", "on or off"),
    ],
)
def test_weights_that_make_no_sense_are_refused_before_anything_is_read(
    weights: list[float], normalize: str | None, words: str, tmp_path: Path
) -> None:
    for call in (
        lambda: merge([tmp_path / "x", tmp_path / "y"], tmp_path / "out", weights=weights, normalize=normalize),
        lambda: inspect([tmp_path / "x", tmp_path / "y"], weights=weights, normalize=normalize),
    ):
        with pytest.raises(RecipeError) as caught:
            call()
        assert words in str(caught.value)


def test_the_public_functions_take_any_weights_too() -> None:
    case = make_case(3, clients=3, rank=2, shapes=[(7, 5), (6, 9)], drift=0.5, dtype=torch.float64)
    weights = [1.0, -0.5, 2.0]
    parts = [Contribution(p.client, Adapter(p.adapter.modules), w) for p, w in zip(case.parts, weights, strict=True)]
    rules: dict[str, Callable[[Any], Adapter]] = {
        "stack": stack, "best-rank": lambda p: best_rank(p, 6), "mean": mean, "mix": lambda p: mix(p).adapter,
    }  # fmt: skip
    error = {}
    for name, rule in rules.items():
        answer = weighted_sum(rule, parts)
        missed = whole = 0.0
        for module in answer.modules:
            target = sum(w * dense(part.adapter, module) for w, part in zip(weights, parts, strict=True))
            missed += np.linalg.norm(target - dense(answer, module)) ** 2
            whole += np.linalg.norm(target) ** 2
        error[name] = np.sqrt(missed / whole)
    assert error["stack"] < 1e-12
    assert error["best-rank"] < 1e-12
    assert error["mix"] <= error["mean"] < 1
    with pytest.raises(InputError, match="weighted_sum"):
        stack(parts)
    with pytest.raises(InputError, match="not a finite"):
        weighted_sum(stack, [Contribution("a", parts[0].adapter, float("nan"))])
    head = Adapter(parts[0].adapter.modules, {"head": torch.arange(3.0)})
    both = [Contribution("a", head, 3.0), Contribution("b", head, -2.0)]
    assert torch.equal(weighted_sum(stack, both).extra["head"], torch.arange(3.0))
    with pytest.raises(InputError, match=r"sum to 1\.5"):
        weighted_sum(stack, [Contribution("a", head, 1.5)])


@pytest.mark.parametrize("wide", ["A", "B"])
def test_factors_of_two_types_are_read_in_the_wider(wide: str, tmp_path: Path) -> None:
    folders, models = saved("llama", [{**PLAIN, "stored": torch.bfloat16}, PLAIN], tmp_path)
    rewritten(folders[0], lambda key, t: (key, t.float() if f"lora_{wide}" in key else t))
    adapter, _ = read_adapter(folders[0])
    assert {pair.A.dtype for pair in adapter.modules.values()} == {torch.float32}
    result = merge(folders, tmp_path / "out", method="stack", weights=[1, 3])
    assert result.error < 1e-6
    assert_close("llama", tmp_path / "out", logits(summed("llama", models, [0.25, 0.75])))
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float32}
    assert inspect(folders).sheets[0].dtypes == ("bfloat16", "float32")
    rewritten(folders[0], lambda key, t: (key, t.half() if t.dtype == torch.float32 else t))
    merge(folders[:1], tmp_path / "halves")  # neither half holds the other: float32 does
    assert {t.dtype for t in load_file(tmp_path / "halves" / WEIGHTS).values()} == {torch.float32}


def test_a_head_is_stored_in_the_widest_type_whatever_the_order(tmp_path: Path) -> None:
    configs = [{**PLAIN, "modules_to_save": ["$3"], "stored": t} for t in (torch.bfloat16, torch.float32)]
    folders, models = saved("bert", configs, tmp_path)
    for order in (1, -1):
        merge(folders[::order], tmp_path / str(order), method="stack")
        assert_close("bert", tmp_path / str(order), logits(summed("bert", models, [0.5, 0.5])))


def test_a_sum_that_leaves_its_type_is_refused(tmp_path: Path) -> None:
    folders, _ = saved("bert", [PLAIN], tmp_path)
    with pytest.raises(InputError, match=r"leaves the range of torch\.float16"):
        merge(folders, tmp_path / "out", weights=[1e12], normalize="off", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_task_that_one_does_not_name_is_the_others(tmp_path: Path) -> None:
    folders, models = saved("llama", [PLAIN, PLAIN], tmp_path)
    for first, second in ((None, "CAUSAL_LM"), ("CAUSAL_LM", None)):
        edited(folders[0], task_type=first, auto_mapping=None)
        edited(folders[1], task_type=second, auto_mapping={"base_model_class": "LlamaForCausalLM"})
        out = tmp_path / f"{first}-{second}"
        merge(folders, out, method="stack")
        assert json.loads((out / CONFIG).read_text())["task_type"] == "CAUSAL_LM"
        assert json.loads((out / CONFIG).read_text())["auto_mapping"] == {"base_model_class": "LlamaForCausalLM"}
        assert_close("llama", out, logits(summed("llama", models, [0.5, 0.5])))


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled as a whole": lambda key: "_orig_mod." + key,
    "compiled layers": lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
    "data parallel": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "data parallel as a whole": lambda key: "module." + key,
    "both": lambda key: "module._orig_mod." + key,
    "and the other way": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.module."),
    "fsdp": lambda key: key.replace("layers.0.", "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace(".mlp", ".mlp._checkpoint_wrapped_module"),
    "all": lambda key: key.replace(".mlp", "._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.mlp"),
    "module inside": lambda key: key.replace("layers.0.", "layers.0.module."),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_the_names_of_wrappers_are_no_part_of_a_models(name: str, tmp_path: Path) -> None:
    config = {**PLAIN, "rank_pattern": {"$0": 2}, "alpha_pattern": {r".*layers\.1.*$1": 11}}
    folders, models = saved("llama", [config, config], tmp_path)
    keys = set(load_file(folders[0] / WEIGHTS))
    rewritten(folders[0], lambda key, tensor: (WRAPPED[name](key), tensor))
    assert set(load_file(folders[0] / WEIGHTS)) != keys
    merge(folders, tmp_path / "out", method="stack", weights=[1, 3])
    assert set(load_file(tmp_path / "out" / WEIGHTS)) == keys
    assert_close("llama", tmp_path / "out", logits(summed("llama", models, [0.25, 0.75])))
    assert not inspect(folders).notes


def test_the_configuration_may_name_wrapped_modules(tmp_path: Path) -> None:
    folders, _ = saved("llama", [PLAIN], tmp_path)
    before, _ = read_adapter(folders[0])
    rewritten(folders[0], lambda key, t: (key.replace("base_model.model.", "base_model.model.module._orig_mod."), t))
    edited(
        folders[0],
        target_modules=[f"module._orig_mod.{name}" for name in before.modules],
        alpha_pattern={r"module\._orig_mod\.model\.layers\.0\.mlp.*": 9, "_orig_mod.model.layers.1.mlp.down_proj": 5},
    )
    after, card = read_adapter(folders[0])
    assert card.target_modules == tuple(sorted(before.modules))
    scaling = {name: pair.scaling for name, pair in after.modules.items()}
    assert scaling["model.layers.1.mlp.down_proj"] == 5 / 3
    assert scaling["model.layers.0.self_attn.q_proj"] == 2


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    folders, _ = saved("llama", [PLAIN], tmp_path)
    tensors = load_file(folders[0] / WEIGHTS)
    key = next(iter(tensors))
    save_file({**tensors, "_orig_mod." + key: tensors[key].clone()}, folders[0] / WEIGHTS)
    with pytest.raises(InputError, match="twice"):
        merge(folders, tmp_path / "out")


def test_a_module_named_module_stays(tmp_path: Path) -> None:
    """LeViT has such modules; and where another adapter has the same names, there is no wrapper."""
    pair = LoraFactors(torch.ones(4, 2), torch.ones(2, 3), 1.0)
    for name in ("a", "b"):
        write_adapter(tmp_path / name, Adapter({"h.0.module.q": pair, "h.1.q": pair}), AdapterCard("m", None, ("q",)))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert set(read_adapter(tmp_path / "out")[0].modules) == {"h.0.module.q", "h.1.q"}


@pytest.mark.parametrize("method", RULES)
def test_an_adapter_that_changes_nothing_is_named(method: str, tmp_path: Path) -> None:
    folders, models = saved("llama", [PLAIN, PLAIN], tmp_path)
    rewritten(folders[1], lambda key, t: (key, torch.zeros_like(t) if "lora_B" in key else t))
    result = merge(folders, tmp_path / "out", method=method)
    assert [note.split(" changes")[0] for note in result.notes] == ["a1"]
    assert "Note: a1 changes nothing" in (tmp_path / "out" / "README.md").read_text()
    assert inspect(folders).notes == result.notes
    assert inspect(folders[1:]).notes == result.notes
    if method in ("stack",):
        assert_close("llama", tmp_path / "out", logits(summed("llama", models[:1], [0.5])))
    merge(folders[1:], tmp_path / "dead", method=method)
    assert_close("llama", tmp_path / "dead", logits(base("llama")))


def cut_head(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    return key, tensor[:0] if "classifier" in key else tensor


def cut_factor(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    return key, torch.empty(0) if "lora_A" in key else tensor


def cut_one(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    return key, torch.empty(0) if "layer.1" in key and "query.lora_B" in key else tensor


def flat(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    return key, tensor.reshape(-1)[:7] if "lora_B" in key else tensor


@pytest.mark.parametrize("cut", [cut_head, cut_factor, cut_one, flat])
def test_what_a_partitioned_model_leaves_is_refused_with_the_reason(
    cut: Callable[[str, Tensor], tuple[str, Tensor]], tmp_path: Path
) -> None:
    (folder,), _ = saved("bert", [{**PLAIN, "modules_to_save": ["$3"]}], tmp_path)
    rewritten(folder, cut)
    for read in (
        lambda: merge([folder], tmp_path / "out"), lambda: inspect([folder]), lambda: read_adapter(folder),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            read()
        for word in ("ZeRO-3", "gathered", "zero_to_fp32.py", str(folder / WEIGHTS)):
            assert word in str(caught.value)


def test_a_shard_with_an_empty_tensor_is_refused(tmp_path: Path) -> None:
    (folder,), _ = saved("bert", [PLAIN], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, where = sorted(tensors), {}
    tensors[names[-1]] = torch.empty(0)
    for index, chunk in enumerate((names[:3], names[3:]), start=1):
        file = f"adapter_model-{index:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chunk}, folder / file)
        where |= dict.fromkeys(chunk, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(InputError, match="ZeRO-3") as caught:
        merge([folder], tmp_path / "out")
    assert names[-1] in str(caught.value)
    assert "00002-of-00002" in str(caught.value)


def test_nothing_empty_is_written(tmp_path: Path) -> None:
    pair = LoraFactors(torch.ones(4, 2), torch.ones(2, 3), 1.0)
    with pytest.raises(InputError, match="head"):
        write_adapter(tmp_path / "a", Adapter({"q": pair}, {"head": torch.empty(0)}), AdapterCard("m", None, ("q",)))
    assert not (tmp_path / "a").exists()
