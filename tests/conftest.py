"""Fixtures shared by all tests: one thread, no hub, the shared data folder, a tiny model made from a configuration."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Of the programs that tests start too; where a test takes more, they sleep while they wait: the machine may be busy.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import hypothesis
import pytest
import torch

from florana.errors import InputError
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.score.programs import run_program

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "florana", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("florana")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

WORDS = [
    "the",
    "a",
    "good",
    "bad",
    "film",
    "story",
    "plot",
    "actor",
    "scene",
    "music",
    "happy",
    "sad",
    "dull",
    "bright",
    "slow",
    "quick",
    "warm",
    "cold",
    "loud",
    "calm",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need the shared data are skipped, visibly, where it is absent."""
    if not SHARED.is_dir():
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(pytest.mark.skip(reason="the shared data folder is absent"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The chaos table: what was survived, how often, with what result."""
    rows = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "chaos"
    ]
    if rows and terminalreporter.config.option.markexpr == "chaos":
        terminalreporter.write_line("\n| test | count | result |\n|---|---|---|")
        for what, count, result in rows:
            terminalreporter.write_line(f"| {what} | {count} | {result} |")


@pytest.fixture(scope="session")
def shared() -> Path:
    return SHARED


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a tokenizer that knows twenty words, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and a tokenizer of bytes, in a folder; no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(special) + len(letters),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of 120 short labelled sentences whose label follows from one word."""
    import random

    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "sentences.csv"
    rows = ["text,label"]
    for index in range(120):
        label = index % 2
        words = [rng.choice(WORDS[4:]) for _ in range(rng.randint(3, 8))]
        words.insert(rng.randrange(len(words)), "good" if label else "bad")
        rows.append(f"{' '.join(words)},{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def recipe_table(tiny_bert: Path, sentences: Path) -> dict[str, object]:
    """A recipe that runs in seconds, as a table."""
    return {
        "task": "sequence-classification",
        "seed": 3,
        "threads": 1,  # on which the last bits depend: the same in this process and in the programs that it starts
        "model": {
            "base": str(tiny_bert),
            "target_modules": ["query", "value", "output.dense"],
            "rank": 2,
            "alpha": 6,
        },
        "data": {"train": str(sentences), "text": "text", "label": "label", "max_length": 16},
        "partition": {"kind": "dirichlet", "clients": 4, "alpha": 1.0},
        "train": {"steps": 3, "batch_size": 8, "learning_rate": 0.01},
        "federation": {"rounds": 3, "clients_per_round": 3},
        "strategy": {"name": "fedit"},
    }


@pytest.fixture
def unlike(recipe_table: dict[str, Any]) -> dict[str, Any]:
    """Three clients of different ranks with heads of their own: everything that differs from client to client."""
    table = copy.deepcopy(recipe_table)
    table["partition"] = {"kind": "dirichlet", "clients": 3, "alpha": 1.0}
    table["federation"] = {"rounds": 2, "min_clients": 3}
    table["model"] |= {"client_ranks": [2, 1], "head": "personal"}
    table["strategy"] = {"name": "best-rank"}
    table["evaluate"] = {"personal": "never"}
    return table


@pytest.fixture
def pooled(unlike: dict[str, Any]) -> Recipe:
    plain = {**unlike, "federation": {"rounds": 2, "min_clients": 1}}
    plain["model"] = {**unlike["model"], "client_ranks": [2], "head": "average"}
    return check(plain, "t")


@pytest.fixture
def launched() -> Iterator[None]:
    """What Flower's launcher does before an app runs; without Flower's log, a page per round."""
    identify = pytest.importorskip("tests.flower_fake").identify
    identify()
    flower = logging.getLogger("flwr")
    level = flower.level
    flower.setLevel(logging.ERROR)
    yield
    flower.setLevel(level)


@pytest.fixture(scope="module")
def runnable() -> None:
    """Root is refused where the kernel holds not every barrier; everyone else runs the tests that need programs."""
    try:
        run_program("", "")
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def recipe(recipe_table: dict[str, Any]) -> Recipe:
    """The small recipe, read."""
    return check(recipe_table, "test")
