"""`merge` and `inspect`: 42 PEFT configurations judged by the model's outputs, refusals by name, honest figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from florana.adapters.inspect import inspect
from florana.adapters.merge import merge
from florana.errors import InputError, RecipeError
from tests.peft_adapters import PLAIN, base, logits, save_adapter, summed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # PEFT's own remarks on biases beside B and on embeddings, which florana merges.
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*"),
]

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "plain": [PLAIN, PLAIN],
    "one alone": [PLAIN],
    "alpha apart": [{"r": 4, "lora_alpha": 4}, {"r": 4, "lora_alpha": 13}],
    "mixed ranks": [{"r": 2, "lora_alpha": 6}, {"r": 5, "lora_alpha": 6}],
    "rslora": [{"r": 4, "lora_alpha": 5, "use_rslora": True}, {"r": 4, "lora_alpha": 7, "use_rslora": True}],
    "rslora and plain": [{"r": 4, "lora_alpha": 5, "use_rslora": True}, PLAIN],
    "rank pattern": [{**PLAIN, "rank_pattern": {"$0": 2}}, {**PLAIN, "rank_pattern": {r"$1": 5}}],
    "alpha pattern": [{**PLAIN, "alpha_pattern": {"$0": 11}}, PLAIN],
    "patterns with rslora": [
        {**PLAIN, "use_rslora": True, "rank_pattern": {"$1": 2}, "alpha_pattern": {"$0": 9}}, PLAIN,
    ],
    "embedding": [{**PLAIN, "targets": [0, 2]}, {"r": 2, "lora_alpha": 3, "targets": [0, 2]}],
    "bias beside B": [{**PLAIN, "lora_bias": True}, {"r": 3, "lora_alpha": 15}],
    "whole head": [{**PLAIN, "modules_to_save": ["$3"]}, {**PLAIN, "modules_to_save": ["$3"]}],
    "three unlike": [
        {"r": 2, "lora_alpha": 1}, {"r": 3, "lora_alpha": 8, "use_rslora": True}, {"r": 6, "lora_alpha": 6},
    ],
    "half precision": [{**PLAIN, "stored": torch.bfloat16}, {**PLAIN, "stored": torch.float16}],
}  # fmt: skip


WEIGHTS = {1: [1.0], 2: [0.3, 0.7], 3: [0.2, 0.5, 0.3]}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_merged_adapter_acts_as_the_weighted_sum_of_the_adapters(kind: str, settings: str, tmp_path: Path) -> None:
    configs = SETTINGS[settings]
    weights = WEIGHTS[len(configs)]
    folders = [tmp_path / f"a{u}" for u in range(len(configs))]
    models = [save_adapter(kind, c, u + 1, folder) for u, (c, folder) in enumerate(zip(configs, folders, strict=True))]
    wanted = logits(summed(kind, models, weights))
    assert (wanted - logits(base(kind))).norm() > 1e-2 * wanted.norm(), "the adapters do nothing: a vacuous test"

    scaled = [7 * weight for weight in weights]
    exact = merge(folders, tmp_path / "exact", method="stack", weights=scaled, dtype="float32")
    loaded = PeftModel.from_pretrained(base(kind), tmp_path / "exact").eval().double()
    assert exact.error < 1e-6
    assert (logits(loaded) - wanted).norm() <= 1e-6 * wanted.norm()

    rank = max(m.rank for m in [exact])
    full = merge(folders, tmp_path / "full", method="best-rank", rank=rank, weights=scaled, dtype="float32")
    loaded = PeftModel.from_pretrained(base(kind), tmp_path / "full").eval().double()
    assert full.error < 1e-6
    assert (logits(loaded) - wanted).norm() <= 2e-6 * wanted.norm()

    best = merge(folders, tmp_path / "best", rank=2, weights=scaled, dtype="float32")
    assert best.error == pytest.approx(best.optimum, rel=1e-5, abs=1e-6)
    assert best.rank == 2


def test_the_card_says_what_went_in_and_the_same_inputs_give_the_same_folder(tmp_path: Path) -> None:
    for u in range(2):
        save_adapter("llama", PLAIN, u, tmp_path / f"site-{u}")
    folders = [tmp_path / "site-0", tmp_path / "site-1"]
    done: list[tuple[int, int]] = []
    result = merge(folders, tmp_path / "one", rank=3, done=lambda count, total: done.append((count, total)))
    merge(folders, tmp_path / "two", rank=3)
    assert done[-1] == (4, 4)
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    card = (tmp_path / "one" / "README.md").read_text()
    assert f"{result.error:.6f}" in card
    for source in result.sources:
        assert source.sha256["adapter_model.safetensors"] in card
        assert source.name in card
    assert str(tmp_path) not in card, "the card names no place on this machine"


def test_methods_are_ordered_as_the_theory_says(tmp_path: Path) -> None:
    for u in range(3):
        save_adapter("bert", PLAIN, u, tmp_path / f"a{u}")
    folders = [tmp_path / f"a{u}" for u in range(3)]
    error = {m: merge(folders, tmp_path / m, method=m).error for m in ("best-rank", "flora-na", "fedit", "stack")}
    assert error["stack"] < 1e-6 < error["best-rank"] <= error["flora-na"] <= error["fedit"]
    looked = inspect(folders)
    for choice in looked.choices:
        if choice.rank == 3 or choice.method == "stack":
            assert choice.error == pytest.approx(error[choice.method], rel=1e-4, abs=1e-6)
            written = (tmp_path / choice.method / "adapter_model.safetensors").stat().st_size
            assert choice.bytes <= written <= choice.bytes + 4096


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    save_adapter("llama", PLAIN, 1, tmp_path / "whole")
    save_adapter("llama", PLAIN, 1, tmp_path / "parts")
    path = tmp_path / "parts" / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names, where = sorted(tensors), {}
    for index, chunk in enumerate((names[:3], names[3:]), start=1):
        file = f"adapter_model-{index:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chunk}, tmp_path / "parts" / file)
        where |= dict.fromkeys(chunk, file)
    index = tmp_path / "parts" / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    merge([tmp_path / "whole", tmp_path / "parts"], tmp_path / "out", method="stack")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../whole/adapter_model.safetensors")}))
    with pytest.raises(InputError, match="outside its own folder"):
        merge([tmp_path / "parts"], tmp_path / "no")


REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {**PLAIN, "use_dora": True},
    "bias is 'lora_only'": {**PLAIN, "bias": "lora_only"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_variants_that_are_no_plain_product_are_refused_by_name(name: str, tmp_path: Path) -> None:
    save_adapter("llama" if "dora" in name else "bert", REFUSED[name], 1, tmp_path / "a")
    with pytest.raises(InputError) as caught:
        merge([tmp_path / "a"], tmp_path / "out")
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_are_refused_with_both_names(tmp_path: Path) -> None:
    save_adapter("llama", PLAIN, 1, tmp_path / "llama")
    save_adapter("llama", PLAIN, 1, tmp_path / "renamed")
    config = tmp_path / "renamed" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "other/model"}))
    with pytest.raises(InputError, match="--base NAME"):
        merge([tmp_path / "llama", tmp_path / "renamed"], tmp_path / "out")
    merged = merge([tmp_path / "llama", tmp_path / "renamed"], tmp_path / "out", base="one/model")
    assert merged.rank == 3
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "one/model"


def test_adapters_of_two_models_are_told_by_their_models_not_by_what_they_lack(tmp_path: Path) -> None:
    save_adapter("llama", PLAIN, 1, tmp_path / "llama")
    save_adapter("bert", {**PLAIN, "modules_to_save": ["$3"]}, 1, tmp_path / "bert")
    for name in ("llama", "bert"):
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": f"some/{name}"}))
    for folders in (["llama", "bert"], ["bert", "llama"]):
        with pytest.raises(
            InputError, match=r"base_model 'some/(bert|llama)' but .* has 'some/(bert|llama)'"
        ) as caught:
            merge([tmp_path / name for name in folders], tmp_path / "out")
        assert "different base models cannot be combined" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "best-rnak"}, "did you mean 'best-rank'"),
        ({"rank": 0}, "not at least 1"),
        ({"rank": 4, "method": "stack"}, "has no meaning for 'stack'"),
        ({"weights": [1.0, 2.0]}, "--weights has 2 for 1 adapter"),
        ({"dtype": "int8"}, "there is no dtype 'int8'"),
    ],
)
def test_senseless_arguments_are_refused_before_anything_is_read(
    arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        merge([tmp_path / "none"], tmp_path / "out", **arguments)
    assert words in str(caught.value)


def test_inspection_figures_against_dense_numpy(tmp_path: Path) -> None:
    folders = [tmp_path / f"a{u}" for u in range(2)]
    models = [
        save_adapter("llama", c, u, f)
        for u, (c, f) in enumerate(zip([{"r": 2, "lora_alpha": 6}, {"r": 4, "lora_alpha": 6}], folders, strict=True))
    ]
    result = inspect(folders, weights=[1, 3])
    deltas: list[dict[str, np.ndarray]] = []
    for model in models:
        deltas.append(
            {
                n: m.get_delta_weight("default").detach().double().numpy()
                for n, m in model.named_modules()
                if hasattr(m, "get_delta_weight")
            }
        )
    for sheet, own in zip(result.sheets, deltas, strict=True):
        assert sheet.norm == pytest.approx(np.sqrt(sum(np.sum(d**2) for d in own.values())), rel=1e-5)
        assert sheet.modules == 4
    overlap = []
    tails, whole = 0.0, 0.0
    for name in deltas[0]:
        spaces = [np.linalg.svd(d[name])[0][:, :r] for d, r in zip(deltas, (2, 4), strict=True)]
        overlap.append(np.sum((spaces[0].T @ spaces[1]) ** 2) / 2)
        values = np.linalg.svd(0.25 * deltas[0][name] + 0.75 * deltas[1][name], compute_uv=False) ** 2
        tails, whole = tails + values[4:].sum(), whole + values.sum()
    assert result.overlap[0][1] == pytest.approx(np.mean(overlap), rel=1e-4)
    assert result.overlap[0][0] == pytest.approx(1.0)
    assert result.energy[4] == pytest.approx(1 - tails / whole, rel=1e-5)
    assert {choice.method for choice in result.choices} == {"best-rank", "stack"}, "fedit needs one rank"


@pytest.mark.shared
def test_the_real_adapters_give_the_figures_of_the_plan(shared: Path, tmp_path: Path) -> None:
    """Means over modules of the real MiniLM adapters, known from an independent calculation."""
    root = shared / "client_adapters" / "minilm-agnews-r8"
    folders = sorted(root.glob("client-*"))
    weights = json.loads((root / "weights.json").read_text())["weights"]
    for method, rank, figure in (
        ("fedit", None, 0.423),
        ("flora-na", None, 0.382),
        ("best-rank", 8, 0.127),
        ("best-rank", 16, 0.036),
        ("best-rank", 32, 0.007),
    ):
        result = merge(folders, tmp_path / f"{method}-{rank}", method=method, rank=rank, weights=weights)
        mean = np.mean([module.error for module in result.modules.values()])
        assert mean == pytest.approx(figure, abs=6e-4)
