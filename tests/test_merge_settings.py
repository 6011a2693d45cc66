"""Every setting of PEFT's LoraConfig: in the table, and judged by the outputs of the merged model or by its refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from florana.adapters.adapter_folder import read_adapter, write_adapter
from florana.adapters.inspect import inspect
from florana.adapters.merge import merge
from florana.adapters.peft_config import CONFIG
from florana.adapters.peft_settings import SETTINGS
from florana.errors import InputError, RecipeError
from tests.peft_adapters import PLAIN, base, logits, save_adapter, summed

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # PEFT's remarks on settings that florana handles
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def edited(folder: Path, **settings: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def assert_acts_as_the_sum(
    kind: str, configs: list[dict[str, Any]], place: Path, weights: tuple[float, ...] = (0.3, 0.7)
) -> dict[str, Any]:
    """Save each by PEFT, merge exactly, load by PEFT, compare logits; the configuration that was written."""
    folders = [place / f"a{u}" for u in range(len(configs))]
    models = [save_adapter(kind, c, u + 1, folder) for u, (c, folder) in enumerate(zip(configs, folders, strict=True))]
    wanted = logits(summed(kind, models, weights))
    assert (wanted - logits(base(kind))).norm() > 1e-2 * wanted.norm(), "the adapters do nothing: a vacuous test"
    result = merge(folders, place / "out", method="stack", weights=list(weights), dtype="float32")
    assert result.error < 1e-6
    loaded = PeftModel.from_pretrained(base(kind), place / "out").eval().double()
    assert (logits(loaded) - wanted).norm() <= 1e-6 * wanted.norm()
    injected = {name for name, module in loaded.named_modules() if isinstance(getattr(module, "scaling", None), dict)}
    assert len(injected) == len(result.modules), "PEFT adapts the modules of the sum, and no others"
    return settings_of(place / "out")


def test_every_setting_of_the_installed_peft_has_a_rule() -> None:
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    assert set(SETTINGS) == set(fields)
    for name, setting in SETTINGS.items():  # and what PEFT writes where nothing was set is off
        field = fields[name]
        default = field.default if field.default is not dataclasses.MISSING else None
        if setting.rule == "refused":
            assert any(type(default) is type(off) and default == off for off in setting.off), name


REFUSED: list[tuple[str, Any]] = [
    ("bias", "all"), ("bias", "lora_only"), ("bias", None),
    ("use_dora", True), ("use_qalora", True), ("use_bdlora", {}), ("use_bdlora", {"nblocks": 2}), ("velora_config", {}),
    ("arrow_config", {"top_k": 2}), ("monteclora_config", {"monteclora_n": 4}), ("kasa_config", {}),
    ("alora_invocation_tokens", [5, 6]), ("trainable_token_indices", [1]), ("trainable_token_indices", {"wte": [1]}),
    ("target_parameters", ["mlp.experts.down_proj"]), ("layer_replication", [[0, 2], [1, 2]]),
    ("megatron_config", {"tp": 2}),
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
    ("init_lora_weights", "OLoRA"), ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"), ("init_lora_weights", "a_start_of_next_year"),
    ("a_setting_of_next_year", True), ("a_setting_of_next_year", 0), ("a_setting_of_next_year", {"x": None}),
    ("layers_to_transform", "0"), ("layers_to_transform", [-1]), ("layers_pattern", "layers"), ("exclude_modules", 3),
    ("auto_mapping", "x"), ("revision", 3), ("ensure_weight_tying", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value"), REFUSED)
def test_what_changes_the_meaning_is_refused_by_name_wherever_adapters_are_read(
    setting: str, value: Any, tmp_path: Path
) -> None:
    save_adapter("llama", PLAIN, 1, tmp_path / "a")
    edited(tmp_path / "a", **{setting: value})
    for read in (
        lambda: merge([tmp_path / "a"], tmp_path / "out"),
        lambda: inspect([tmp_path / "a"]),
        lambda: read_adapter(tmp_path / "a"),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert setting in str(caught.value)
        assert str(tmp_path / "a" / CONFIG) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_settings_that_are_off_or_idle_are_taken(tmp_path: Path) -> None:
    save_adapter("llama", PLAIN, 1, tmp_path / "a")
    off = {name: s.off[-1] for name, s in SETTINGS.items() if s.rule == "refused"}
    idle = {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "corda_config": {}, "lora_ga_config": {},
            "lora_dropout": 0.3, "inference_mode": False, "peft_version": "0.1", "qalora_group_size": 8,
            "megatron_core": "x", "runtime_config": {}}  # fmt: skip
    assert {name for name, s in SETTINGS.items() if s.rule == "idle"} == set(idle)
    unknown = {"of_next_year": None, "of_last_year": False, "and": {}, "so": [], "on": ""}
    before = read_adapter(tmp_path / "a")[1]
    edited(tmp_path / "a", **off, **idle, **unknown, init_lora_weights="eva")
    assert read_adapter(tmp_path / "a")[1] == before


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_alters_the_base_would_be_wrong_and_is_refused(start: str, tmp_path: Path) -> None:
    model = save_adapter("llama", {**PLAIN, "init_lora_weights": start, "computed": torch.float32}, 1, tmp_path / "a")
    loaded = PeftModel.from_pretrained(base("llama").float(), tmp_path / "a").eval().double()
    plain = logits(summed("llama", [model], [1.0]))
    assert (logits(loaded) - plain).norm() > 1e-2 * plain.norm(), "PEFT alters the base when it loads this"
    with pytest.raises(InputError, match="path_initial_model_for_weight_conversion"):
        merge([tmp_path / "a"], tmp_path / "out")


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_merged(start: Any, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": start}
    if start == "mica":  # PEFT starts it in float32 at most
        config["computed"] = torch.float32
    written = assert_acts_as_the_sum("llama", [config, {**PLAIN, "lora_dropout": 0.2}], tmp_path)
    assert written["init_lora_weights"] is True


CARRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "pattern": ("llama", {"targets": r".*\.(q_proj|down_proj)"}),
    "pattern with a lookahead": ("llama", {"targets": r"(?!.*layers\.0).*\.(?:q_proj|up_proj)"}),
    "pattern of a whole name": (
        "bert",
        {"targets": r"bert\.encoder\.layer\.1\.(attention\..*query|inter.*dense)"},
    ),
    "one layer": ("llama", {"layers_to_transform": 0}),
    "layers": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers by two patterns": ("gpt2", {"layers_to_transform": [1], "layers_pattern": ["layers", "h"]}),
    "excluded by name": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded by pattern": ("gpt2", {"exclude_modules": r".*h\.1.*"}),
    "tied": ("tied", {"ensure_weight_tying": True, "targets": [0, 2]}),
    "embedding of a tied model": ("tied", {"targets": [0, 2]}),
    "revision": ("llama", {"revision": "v1"}),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_all_adapters_say_goes_through(name: str, tmp_path: Path) -> None:
    kind, settings = CARRIED[name]
    written = assert_acts_as_the_sum(kind, [{**PLAIN, **settings}, {"r": 2, "lora_alpha": 7, **settings}], tmp_path)
    given = settings_of(tmp_path / "a0")
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern", "revision", "ensure_weight_tying"):
        assert (written.get(setting) or None) == (given[setting] or None), setting
    if isinstance(given["target_modules"], str):
        assert written["target_modules"] == given["target_modules"]
    adapter, card = read_adapter(tmp_path / "out")  # and once more, by the public functions
    write_adapter(tmp_path / "again", adapter, card)
    assert settings_of(tmp_path / "again") == written


UNLIKE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pattern beside names": ("llama", {"targets": r".*\.(q_proj|down_proj)"}, {}),
    "two patterns": ("llama", {"targets": r".*0.*\.(q_proj|down_proj)"}, {"targets": r".*1.*(q_proj|up_proj)"}),
    "layers apart": ("llama", {"layers_to_transform": 0}, {"layers_to_transform": [1]}),
    "layers beside all": ("gpt2", {"layers_to_transform": [1], "layers_pattern": "h"}, {}),
    "excluded in one": ("bert", {"exclude_modules": ["intermediate.dense"]}, {}),
    "excluded apart": ("llama", {"exclude_modules": r".*layers\.0.*"}, {"exclude_modules": r".*layers\.1.*"}),
    "starts apart": ("llama", {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}),
    "revision in one": ("llama", {"revision": "v1"}, {}),
    "tied of other modules": (
        "tied", {"ensure_weight_tying": True, "targets": [0, 2]}, {"ensure_weight_tying": True, "targets": [1, 2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["fedit", "flora-na"])
def test_tied_factors_are_not_averaged_apart(method: str, tmp_path: Path) -> None:
    folders = [tmp_path / f"a{u}" for u in range(2)]
    settings = {"r": 3, "ensure_weight_tying": True, "targets": [0, 2]}
    models = [save_adapter("tied", {**settings, "lora_alpha": 3 + u}, u, folder) for u, folder in enumerate(folders)]
    with pytest.raises(RecipeError, match="ensure_weight_tying"):
        merge(folders, tmp_path / "out", method=method)
    result = merge(folders, tmp_path / "out", rank=6, weights=[1, 3], dtype="float32")
    assert result.error < 1e-6
    loaded = PeftModel.from_pretrained(base("tied"), tmp_path / "out").eval().double()
    wanted = logits(summed("tied", models, [0.25, 0.75]))
    assert (logits(loaded) - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("name", UNLIKE)
def test_selections_that_differ_become_the_names_of_all_modules(name: str, tmp_path: Path) -> None:
    kind, first, second = UNLIKE[name]
    written = assert_acts_as_the_sum(kind, [{**PLAIN, **first}, {"r": 2, "lora_alpha": 7, **second}], tmp_path)
    if name not in ("starts apart", "revision in one"):
        assert all("." in module or module == "lm_head" for module in written["target_modules"])
        assert not any(written.get(setting) for setting in ("exclude_modules", "layers_to_transform", "layers_pattern"))


@pytest.mark.parametrize(
    ("setting", "one", "other"),
    [
        ("ensure_weight_tying", True, False),
        ("revision", "v1", "v2"),
        ("auto_mapping", {"base_model_class": "A"}, {"base_model_class": "B"}),
        ("fan_in_fan_out", True, False),
        ("task_type", "CAUSAL_LM", "SEQ_CLS"),
    ],
)
def test_settings_that_must_be_alike_are_refused_by_name(setting: str, one: Any, other: Any, tmp_path: Path) -> None:
    for name, value in (("a", one), ("b", other)):
        save_adapter("llama", PLAIN, 1, tmp_path / name)
        edited(tmp_path / name, **{setting: value})
    with pytest.raises(InputError) as caught:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    for word in (setting, str(tmp_path / "a"), str(tmp_path / "b"), repr(one), repr(other)):
        assert word in str(caught.value)
    if setting == "revision":
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", base="one/model")
        assert not settings_of(tmp_path / "out").get("revision"), "a revision of a name that was replaced"


def test_factors_that_peft_would_leave_out_are_refused(tmp_path: Path) -> None:
    save_adapter("llama", PLAIN, 1, tmp_path / "a")
    for targets in (["q_proj"], r".*\.q_proj", "q_proj"):
        with pytest.raises(InputError, match="target_modules does not name it"):
            read_adapter(edited(tmp_path / "a", target_modules=targets))
    edited(tmp_path / "a", target_modules=["q_proj", "down_proj"], modules_to_save=["mlp"])
    with pytest.raises(InputError, match="'mlp', which is saved whole"):
        merge([tmp_path / "a"], tmp_path / "out")


def test_one_adapters_factors_in_anothers_whole_module_are_refused(tmp_path: Path) -> None:
    save_adapter("llama", {**PLAIN, "targets": [0, 3]}, 1, tmp_path / "a")
    save_adapter("llama", {**PLAIN, "targets": [0], "modules_to_save": ["$3"]}, 1, tmp_path / "b")
    with pytest.raises(InputError, match="lm_head"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_biases_beside_an_embedding_are_refused(tmp_path: Path) -> None:
    save_adapter("bert", {**PLAIN, "lora_bias": True}, 1, tmp_path / "a")
    save_adapter("bert", {**PLAIN, "targets": [0, 2]}, 1, tmp_path / "b")
    with pytest.raises(InputError, match="word_embeddings"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_the_card_carries_nothing_else(tmp_path: Path) -> None:
    save_adapter("llama", PLAIN, 1, tmp_path / "a")
    adapter, card = read_adapter(tmp_path / "a")
    for setting in ("use_dora", "of_next_year"):
        with pytest.raises(InputError, match=setting):
            write_adapter(tmp_path / "b", adapter, dataclasses.replace(card, carried={setting: True}))
    assert not (tmp_path / "b").exists()
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")
