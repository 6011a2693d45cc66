"""The adapter that a run leaves is the model it measured, for every family of the table; what cannot be is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from florana.adapters.adapter_folder import read_adapter
from florana.errors import InputError
from florana.federation.journal import read_records
from florana.lora.factors import Adapter
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.setup import execute
from florana.train.data.tokenize import encode_classes, encode_language
from florana.train.evaluate import evaluate
from florana.train.generate import generate
from florana.train.model import Workbench
from florana.train.probe import pads_left
from florana.train.shapes import shapes_of
from tests.conftest import ROOT, WORDS
from tests.families import CLASSES, FAMILIES, GPT2, GROUPED, LANGUAGE, PLAIN, Family, Task

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

AUTO = {CLASSES: transformers.AutoModelForSequenceClassification, LANGUAGE: transformers.AutoModelForCausalLM}
ROWS = [(name, task) for name, family in FAMILIES.items() for task in family.tasks]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def write_texts(folder: Path) -> Path:
    """Twelve rows to train on and ten to measure on, of different lengths, in two classes."""
    draw = random.Random(0)
    for name, count in (("train", 12), ("test", 10)):
        words = [[draw.choice(WORDS) for _ in range(draw.randint(3, 9))] for _ in range(count)]
        rows = [f"{' '.join(own)},{index % 2}" for index, own in enumerate(words)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


def recipe_of(model: Path, task: Task, texts: Path, family: Family, **model_settings: Any) -> Recipe:
    table: dict[str, Any] = {
        "task": task,
        "seed": 3,
        "model": {"base": str(model), "target_modules": family.targets, "rank": 2, "alpha": 6} | model_settings,
        "data": {"train": str(texts / "train.csv"), "test": str(texts / "test.csv"), "max_length": 16},
        "partition": {"kind": "iid", "clients": 2, "holdout": 0},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.3},
        "federation": {"rounds": 1},
        "strategy": {"name": "fedit"},
        "evaluate": {"personal": "never", "batch_size": 4},
    }
    if task == CLASSES:
        table["data"]["label"] = "label"
    return check(table, "test")


def by_peft_alone(base: Any, model: Path, task: Task, texts: Path) -> dict[str, float]:
    """The figures of a model row by row, with what its tokenizer returns, written without florana."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loss = right = count = 0.0
    for line in (texts / "test.csv").read_text().splitlines()[1:]:
        text, label = line.split(",")
        if task == CLASSES:
            given = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
            wanted = torch.tensor([int(label)])
        else:
            pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [tokenizer.bos_token_id, *pieces, tokenizer.eos_token_id]
            given, wanted = {"input_ids": torch.tensor([ids])}, torch.tensor(ids[1:])
        with torch.no_grad():
            logits = base(**given).logits.float()
        logits = logits if task == CLASSES else logits[0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        right += float((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    return {"loss": loss / count} | ({"accuracy": right / count} if task == CLASSES else {})


def fresh(model: Path, task: Task, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AUTO[task].from_pretrained(model, **({"num_labels": 2} if task == CLASSES else {})).eval()


def run_and_reload(
    family: Family, task: Task, texts: Path, folder: Path
) -> tuple[Mapping[str, float], dict[str, float], Adapter]:
    """The figures of a run's last round; those of RUN/adapter by PEFT alone on a fresh base; the adapter."""
    model = family.write(folder / "model")
    execute(recipe_of(model, task, texts, family), folder / "run")
    figures = read_records(folder / "run" / "rounds.jsonl")[-1].eval["global"]
    loaded = PeftModel.from_pretrained(fresh(model, task, 99), folder / "run" / "adapter").eval()
    return figures, by_peft_alone(loaded, model, task, texts), read_adapter(folder / "run" / "adapter")[0]


@pytest.mark.parametrize(("name", "task"), ROWS, ids=[f"{name}-{task[:6]}" for name, task in ROWS])
def test_the_adapter_is_the_model_that_was_measured(name: str, task: Task, texts: Path, tmp_path: Path) -> None:
    """RUN/adapter on a fresh base of another seed, by PEFT alone, has the figures of rounds.jsonl; a plan counts it."""
    family, model = FAMILIES[name], tmp_path / "model"
    figures, again, adapter = run_and_reload(family, task, texts, tmp_path)
    assert again == pytest.approx({figure: figures[figure] for figure in again}, abs=1e-4)
    bare = by_peft_alone(fresh(model, task, 99), model, task, texts)
    assert abs(bare["loss"] - again["loss"]) > 1e-3, "the figures do not show the adapter"
    prefix = fresh(model, task, 0).base_model_prefix + "."
    planned = shapes_of(str(model), family.targets, task).modules
    assert planned == {module.removeprefix(prefix): pair.shape for module, pair in adapter.modules.items()}


def test_the_docs_list_these_families_and_no_others() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    listed = [line.split("|")[1:5] for line in page.splitlines() if line.startswith("| ") and "Config`" in line]
    wanted = [[name, f"`{f.config}`", f.kind, ", ".join(f.tasks)] for name, f in FAMILIES.items()]
    assert [[cell.strip() for cell in row] for row in listed] == wanted


def bench_of(folder: Path, task: str = CLASSES, **settings: Any) -> Workbench:
    recipe = {"base": str(folder), "rank": 2, "alpha": 6} | settings
    made = check(
        {"task": task, "model": recipe, "data": {"train": "x", "label": "label"}, "partition": {"clients": 2},
         "train": {"steps": 1}, "strategy": {"name": "fedit"}}, "test"
    )  # fmt: skip
    return Workbench(made.model, task, ("0", "1") if task == CLASSES else (), 3)


def without(folder: Path, *ends: str) -> None:
    """Take the tensors whose names end so out of a checkpoint."""
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_trained_whole_is_what_no_checkpoint_has(tmp_path: Path) -> None:
    """BERT's pooler is LoRA's where the checkpoint has it and trained whole where it has not; both ways it is saved."""
    masked = FAMILIES["BERT"].write(tmp_path / "masked")
    bench = bench_of(masked)
    assert bench.card.modules_to_save == ("bert.pooler", "classifier", "score")
    assert set(bench.adapter().extra) == {
        f"{module}.{part}" for module in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")
    }
    assert not any("pooler" in name for name in bench.adapter().modules)
    whole = Family("BertConfig", PLAIN, "encoder", [CLASSES], "AutoModel").write(tmp_path / "whole")
    assert "bert.pooler.dense" in bench_of(whole).adapter().modules


def test_a_checkpoint_that_lacks_a_part_of_its_model_is_refused_by_name(tmp_path: Path) -> None:
    layer = FAMILIES["BERT"].write(tmp_path / "layer")
    without(layer, "layer.1.output.dense.weight", "layer.1.output.dense.bias")
    with pytest.raises(InputError, match=r"lacks bert\.encoder\.layer\.1\.output\.dense"):
        bench_of(layer)
    with pytest.raises(InputError, match=r"lacks bert\.encoder\.layer\.1\.output\.dense"):
        shapes_of(str(layer), ["query"])
    words = FAMILIES["BERT"].write(tmp_path / "words")
    without(words, "position_embeddings.weight")
    with pytest.raises(InputError, match=r"lacks bert\.embeddings\.position_embeddings"):
        bench_of(words)
    head = Family("LlamaConfig", GROUPED, "decoder", [LANGUAGE], "AutoModel").write(tmp_path / "head")
    with pytest.raises(InputError, match=r"lacks lm_head\.weight, which task = 'causal-lm' needs"):
        bench_of(head, LANGUAGE)
    tied = Family("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, "decoder", [LANGUAGE], "AutoModel")
    assert bench_of(tied.write(tmp_path / "tied"), LANGUAGE).card.modules_to_save == ()


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    encoder = Family("BertConfig", PLAIN, "encoder", [CLASSES], "AutoModel").write(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"lacks cls\.predictions"):
        bench_of(encoder, LANGUAGE)
    with pytest.raises(InputError, match="sees the tokens that task = 'causal-lm' has it predict"):
        bench_of(FAMILIES["BERT"].write(tmp_path / "masked"), LANGUAGE)
    decoder = Family("BertConfig", {**PLAIN, "is_decoder": True}, "decoder", [LANGUAGE], "AutoModelForCausalLM")
    assert bench_of(decoder.write(tmp_path / "decoder"), LANGUAGE).padding == "right"


def test_a_head_of_other_classes_is_named(tmp_path: Path) -> None:
    family = Family(
        "BertConfig", {**PLAIN, "num_labels": 5}, "encoder", [CLASSES], "AutoModelForSequenceClassification"
    )
    folder = family.write(tmp_path / "five")
    with pytest.raises(InputError, match=r"holds 'classifier\.\w+' as \(5.*, but its model has it as \(2"):
        bench_of(folder)


def test_only_what_the_tokenizer_returned_is_sent(tmp_path: Path) -> None:
    """GPT-2 reads token types with its word table: zeros that nobody sent would add word 0 everywhere."""
    folder = FAMILIES["GPT-2"].write(tmp_path / "gpt2")
    bench = bench_of(folder, LANGUAGE)
    rows = encode_language([("good film",), ("a sad story now",)], bench.tokenizer, 16)
    assert set(bench.batch(rows)) == {"input_ids", "attention_mask", "labels"}
    pairs = bench_of(FAMILIES["BERT"].write(tmp_path / "bert"))
    batch = pairs.batch(encode_classes([("good", "film story"), ("sad", "plot")], [0, 1], pairs.tokenizer, 16))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    tokenizer = pairs.tokenizer("good", "film story")
    assert batch["token_type_ids"][0].tolist() == tokenizer["token_type_ids"]


def test_a_decoder_whose_tokenizer_gives_token_types_gets_them_everywhere(tmp_path: Path) -> None:
    family = Family("GPT2Config", GPT2, "decoder", [LANGUAGE], "AutoModelForCausalLM", tokenizer="pairs")
    bench = bench_of(family.write(tmp_path / "model"), LANGUAGE)
    model = fresh(tmp_path / "model", LANGUAGE, 0)
    rows = encode_language([("good film story",)], bench.tokenizer, 16)
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        wanted = float(model(ids, token_type_ids=torch.zeros_like(ids), labels=ids).loss)
        plain = float(model(ids, labels=ids).loss)
        prompt = ids[:, :-1]  # as it is asked: a beginning token, then the text
        written = model.generate(
            prompt, token_type_ids=torch.zeros_like(prompt), attention_mask=torch.ones_like(prompt), max_new_tokens=3,
            do_sample=False, pad_token_id=1,
        )  # fmt: skip
    assert abs(wanted - plain) > 1e-3
    assert evaluate(bench, rows, 1)["loss"] == pytest.approx(wanted, abs=1e-5)
    text = bench.tokenizer.decode(written[0], skip_special_tokens=True)
    (own,) = generate(bench, ["good film story"], max_new_tokens=3).texts[0]
    assert text.removeprefix("good film story") == own


@pytest.mark.parametrize(
    "name", ["Mixtral", "Qwen3-MoE", "Qwen2-MoE", "DeepSeek-V3", "GPT-OSS", "Granite-MoE", "Llama 4 (text)"]
)
def test_all_linear_of_a_mixture_names_the_experts_and_what_works(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.write(tmp_path / "model")
    with pytest.raises(InputError, match="is a mixture of experts") as caught:
        bench_of(folder, LANGUAGE)
    message = str(caught.value)
    assert "experts." in message
    named = json.loads(message.rpartition("model.target_modules = ")[2])
    assert set(family.targets) <= set(named)
    assert bench_of(folder, LANGUAGE, target_modules=named).adapter().modules
    with pytest.raises(InputError, match="is a mixture of experts"):
        shapes_of(str(folder), ["all-linear"], LANGUAGE)


@pytest.mark.parametrize("targets", [["q_proj", "experts"], ["gate"], r".*\.mlp\..*"], ids=str)
def test_experts_and_routers_cannot_be_named_either(targets: str | list[str], tmp_path: Path) -> None:
    folder = FAMILIES["Mixtral"].write(tmp_path / "model")
    with pytest.raises(InputError, match="is no linear layer"):
        bench_of(folder, LANGUAGE, target_modules=targets)


def test_names_that_peft_gives_to_experts_are_refused_not_dropped(tmp_path: Path) -> None:
    """In a Qwen3-MoE with a dense layer, PEFT takes `gate_proj` for the experts' and leaves the dense one out."""
    dense = Family("Qwen3MoeConfig", {**FAMILIES["Qwen3-MoE"].settings, "mlp_only_layers": [0]}, "mixture", [LANGUAGE])
    folder = Family(dense.config, dense.settings, "mixture", [LANGUAGE], "AutoModelForCausalLM").write(tmp_path / "m")
    with pytest.raises(InputError, match=r"PEFT would not load what is trained of .*mlp\.gate_proj"):
        bench_of(folder, LANGUAGE, target_modules=["q_proj", "gate_proj", "up_proj"])


def test_a_fused_kernels_layers_are_named(tmp_path: Path) -> None:
    folder = FAMILIES["Mamba"].write(tmp_path / "mamba")
    with pytest.raises(InputError, match=r'cannot adapt out_proj.*\n.*\n.*\["dt_proj", "in_proj", "x_proj"\]'):
        bench_of(folder, LANGUAGE)


@pytest.mark.parametrize(("name", "side"), [("XLNet", "left"), ("BERT", "right"), ("FNet", None), ("GPT-2", "right")])
def test_rows_are_padded_where_it_changes_nothing(name: str, side: str | None, tmp_path: Path) -> None:
    bench = bench_of(FAMILIES[name].write(tmp_path / "model"))
    assert bench.padding == side
    texts = [("good",), ("a sad story now",), ("bad film",), ("a dull plot",)]
    rows = encode_classes(texts, [0, 1, 0, 1], bench.tokenizer, 16)
    together, alone = evaluate(bench, rows, 4)["loss"], evaluate(bench, rows, 1)["loss"]
    assert together == pytest.approx(alone, abs=1e-5)


def test_left_padding_that_a_tokenizer_names_is_kept_from_positions_that_it_would_move(tmp_path: Path) -> None:
    """GPT-2 counts positions from the first column: padded on the left, a row would be another one."""
    folder = FAMILIES["GPT-2"].write(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    bench = bench_of(folder)
    assert (bench.tokenizer.padding_side, bench.padding) == ("left", "right")


def test_a_personal_head_is_all_that_is_trained_whole(texts: Path, tmp_path: Path) -> None:
    family = FAMILIES["DeBERTa-v2"]
    recipe = recipe_of(family.write(tmp_path / "model"), CLASSES, texts, family, head="personal")
    execute(recipe, tmp_path / "run")
    keys = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in key for key in keys)
    assert math.isfinite(read_records(tmp_path / "run" / "rounds.jsonl")[-1].train_loss or math.nan)


def test_a_model_that_fails_on_two_texts_is_refused(tmp_path: Path) -> None:
    """BART finds its answer at the end token: with a tokenizer that writes none, there is no such place."""
    family = FAMILIES["BART"]
    folder = Family(family.config, family.settings, "", [CLASSES], family.saved, tokenizer="letters").write(
        tmp_path / "m"
    )
    with pytest.raises(InputError, match="fails on two short texts"):
        bench_of(folder)


@pytest.mark.parametrize("name", ["RWKV", "Mamba", "GPT-2", "OPT"])
def test_what_is_written_does_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """RWKV reads the padding on the left, too: its prompts are batched by length."""
    bench = bench_of(FAMILIES[name].write(tmp_path / "model"), LANGUAGE, target_modules=FAMILIES[name].targets)
    prompts = ["good", "a sad story now", "bad film", "a dull plot", "the slow warm loud scene"]
    together = generate(bench, prompts, max_new_tokens=4, batch_size=5).texts
    assert together == generate(bench, prompts, max_new_tokens=4, batch_size=1).texts
    assert len(set(together)) > 1
    assert pads_left(bench) == (name != "RWKV")
