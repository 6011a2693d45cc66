"""Adapter folders: what florana writes PEFT loads with the same outputs, and the other way; damage is named."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from florana.adapters.adapter_folder import CONFIG, WEIGHTS, AdapterCard, read_adapter, write_adapter
from florana.aggregate.stack import stack
from florana.errors import InputError
from florana.lora.factors import Adapter, Contribution, LoraFactors
from tests import fuzz
from tests.fuzz_reading import reading

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

MODELS: dict[str, Any] = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ),
    "gpt2 (Conv1D)": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "llama (grouped keys)": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
        )
    ),
}
TARGETS = {
    "bert": ["query", "intermediate.dense"],
    "gpt2 (Conv1D)": ["c_attn", "c_fc"],
    "llama (grouped keys)": ["k_proj", "down_proj"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 3, "lora_alpha": 6, "rank_pattern": {"layer.1": 2}, "alpha_pattern": {"query": 5}},
}


def base(kind: str) -> Any:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def with_adapter(kind: str, settings: dict[str, Any], seed: int) -> Any:
    """A PEFT model with random, non-zero factors."""
    settings = dict(settings)
    if settings.get("rank_pattern"):  # a pattern that meets modules of every family
        settings["rank_pattern"] = {rf".*1.*{TARGETS[kind][0]}": 2}
        settings["alpha_pattern"] = {TARGETS[kind][1]: 5}
    config = LoraConfig(
        target_modules=TARGETS[kind],
        fan_in_fan_out="gpt2" in kind,
        modules_to_save=["classifier"] if kind == "bert" else None,
        **settings,
    )
    model = get_peft_model(base(kind), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=ids).logits
    return output


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_peft_to_florana_to_peft_gives_the_same_outputs(kind: str, settings: str, tmp_path: Path) -> None:
    model = with_adapter(kind, CONFIGS[settings], seed=1)
    model.save_pretrained(tmp_path / "peft")
    adapter, card = read_adapter(tmp_path / "peft")
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            assert adapter.modules[name.removeprefix("base_model.model.")].scaling == module.scaling["default"]
    write_adapter(tmp_path / "ours", adapter, card)
    again = PeftModel.from_pretrained(base(kind), tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(base(kind)), atol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_the_exact_stack_gives_the_weighted_sum_of_the_models_own_deltas(kind: str, tmp_path: Path) -> None:
    """Against PEFT's own delta weights, both weight layouts: the merged model's weights are base + sum w_u delta_u."""
    parts, deltas, weights = [], [], [0.25, 0.75]
    for seed, weight, settings in zip((1, 2), weights, ("plain", "rslora"), strict=True):
        model = with_adapter(kind, CONFIGS[settings], seed)
        model.save_pretrained(tmp_path / str(seed))
        adapter, card = read_adapter(tmp_path / str(seed))
        parts.append(Contribution(str(seed), Adapter(adapter.modules), weight))
        deltas.append(
            {
                name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
                for name, module in model.named_modules()
                if hasattr(module, "get_delta_weight") and module.scaling
            }
        )
    merged = stack(parts)
    plain_card = AdapterCard(card.base_model, None, card.target_modules, fan_in_fan_out=card.fan_in_fan_out)
    write_adapter(tmp_path / "merged", merged, plain_card)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path / "merged").merge_and_unload()
    for name in merged.modules:
        wanted = base(kind).get_submodule(name).weight + sum(w * d[name] for w, d in zip(weights, deltas, strict=True))
        assert torch.allclose(loaded.get_submodule(name).weight, wanted, atol=1e-5)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    card = AdapterCard("b", "CAUSAL_LM", ("z", "a"), ("head",))
    adapter = Adapter({n: LoraFactors(torch.ones(4, 2), torch.ones(2, 3), 1.5) for n in ("b", "a")})
    for folder in ("x", "y"):
        write_adapter(tmp_path / folder, adapter, card)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    assert not list((tmp_path / "x").glob("*.tmp"))


def test_a_pattern_is_of_its_module_alone(tmp_path: Path) -> None:
    """A name that ends another's, or is another's as a regular expression: as PEFT reads the written patterns."""
    ranks = {"q": 1, "a.q": 2, "b.a.q": 3, "h.1.1": 4, "h.111": 5, "x.q": 6, "y.q": 6, "z.q": 6}
    pairs = {n: LoraFactors(torch.ones(4, r), torch.ones(r, 3), 1.0 + r) for n, r in ranks.items()}
    write_adapter(tmp_path, Adapter(pairs), AdapterCard("b", None, tuple(ranks)))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert "b.a.q" in config["rank_pattern"], "plain where it can be"
    for name, rank in ranks.items():
        for setting, default, wanted in (
            ("rank_pattern", "r", rank),
            ("alpha_pattern", "lora_alpha", rank * (1 + rank)),
        ):
            assert config[setting].get(get_pattern_key(config[setting], name), config[default]) == wanted, name
    adapter, _ = read_adapter(tmp_path)
    assert {name: pair.rank for name, pair in adapter.modules.items()} == ranks
    assert adapter.scalings == {name: 1.0 + rank for name, rank in ranks.items()}


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("bias", "all"), ("use_qalora", True), ("peft_type", "IA3"), ("r", 0), ("lora_alpha", "x"),
     ("rank_pattern", {"q": -1}), ("r", 3), ("rank_pattern", {"(": 2})],
)  # fmt: skip
def test_what_is_no_plain_product_or_does_not_fit_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    adapter = Adapter({"q": LoraFactors(torch.ones(4, 2), torch.ones(2, 3), 1.0)})
    write_adapter(tmp_path, adapter, AdapterCard("b", None, ("q",)))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError) as caught:
        read_adapter(tmp_path)
    assert caught.value.exit_code == 3


@pytest.mark.slow
@pytest.mark.parametrize("count", [2_500, pytest.param(10_000, marks=pytest.mark.chaos)])
def test_damaged_folders_are_named_or_read_as_their_bytes_say(count: int, tmp_path: Path) -> None:
    """Each is refused with an InputError that names a file of the folder, or gives exactly what an independent parse
    of the same bytes gives: every tensor, every scaling, every word of the card. Nothing else is raised."""
    place = fuzz.Folder(tmp_path)
    rng = random.Random(0)
    refused: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    unnamed: list[str] = []
    for _ in range(count):
        kind = place.mutate(rng)
        try:
            adapter, card = read_adapter(place.folder)
        except InputError as error:
            refused[kind] += 1
            unnamed += [f"{kind}: {error}"] if str(place.folder) not in str(error) else []
            continue
        taken[kind] += 1
        tensors, scalings, config = reading(place.folder)
        read = adapter.tensors()
        assert read.keys() == tensors.keys(), kind
        for name, tensor in read.items():
            assert np.isfinite(tensors[name]).all(), kind
            assert np.array_equal(tensor.double().numpy(), tensors[name]), (kind, name)
        assert adapter.scalings == pytest.approx(scalings, rel=1e-12), kind
        for field, setting in (("base_model", "base_model_name_or_path"), ("task_type", "task_type")):
            assert (getattr(card, field) or "") == (config.get(setting) or ""), kind
        for field in ("target_modules", "modules_to_save"):
            value = config.get(field) or []
            assert sorted(getattr(card, field)) == sorted([value] if isinstance(value, str) else value), kind
        assert (card.fan_in_fan_out, card.rslora) == (
            bool(config.get("fan_in_fan_out")),
            bool(config.get("use_rslora")),
        )
    assert unnamed == []
    assert set(refused) == {kind.__name__ for kind in place.kinds}, "every kind of damage is refused at times"
    assert {"values", "config_value", "weight_bytes", "shards", "renamed", "link"} <= set(taken), "and some is harmless"


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    write_adapter(
        tmp_path, Adapter({"q": LoraFactors(torch.ones(4, 2), torch.ones(2, 3), 1.0)}), AdapterCard("b", None, ("q",))
    )
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=missing):
        read_adapter(tmp_path)


@pytest.mark.shared
def test_the_real_client_adapters_are_read(shared: Path) -> None:
    adapter, card = read_adapter(shared / "client_adapters" / "minilm-agnews-r8" / "client-0")
    assert len(adapter.modules) == 12
    assert {pair.shape for pair in adapter.modules.values()} == {(384, 384)}
    assert set(adapter.scalings.values()) == {2.0}
    assert set(adapter.extra) == {"classifier.weight", "classifier.bias"}
    assert card.task_type == "SEQ_CLS"
