"""Instruction tuning: which tokens count, against hand-written sequences and a hand-computed loss; what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from florana.errors import InputError, RecipeError
from florana.federation.journal import read_records
from florana.recipe.load import check
from florana.report.page import write_report
from florana.runs.dry_run import plan
from florana.runs.prepared import prepare
from florana.runs.setup import execute, global_scores
from florana.train.client import train_locally
from florana.train.data.tokenize import IGNORED, collate

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}{{ raise_exception('no system messages here') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": f"Add {i}.", "input": "1 2" if i % 2 else "", "output": f"It is {i}"} for i in range(8)],
    "dolly": [
        {
            "instruction": f"Add {i}.",
            "context": "1 2" if i % 2 else "",
            "response": f"It is {i}",
            "category": f"c{i % 2}",
        }
        for i in range(8)
    ],
    "prompt-response": [{"prompt": f"Add {i}.", "response": f"It is {i}"} for i in range(8)],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": f"Add {i}."},
                {"role": "assistant", "content": f"It is {i}"},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
        for i in range(8)
    ],
}


def table_of(
    base: Path, folder: Path, kind: str, rows: list[dict[str, Any]] | None = None, **data: Any
) -> dict[str, Any]:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[kind] if rows is None else rows)))
    return {
        "task": "causal-lm",
        "seed": 2,
        "model": {"base": str(base), "target_modules": ["q_proj", "down_proj"], "rank": 2, "alpha": 6},
        "data": {"train": str(path), "test": str(path), "instructions": kind, "max_length": 160, **data},
        "partition": {"kind": "iid", "clients": 2},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "federation": {"rounds": 2},
        "strategy": {"name": "fedit"},
    }


@pytest.fixture
def chatty(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with a chat template."""
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def parts_of(base: Path, example: Any) -> list[tuple[str, bool]]:
    """(text, whether it counts) of the stretches of an example."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    stretches: list[tuple[list[int], bool]] = []
    for token, label in zip(example.ids, example.labels, strict=True):
        counts = label != IGNORED
        assert label in (IGNORED, token)
        if not stretches or stretches[-1][1] != counts:
            stretches.append(([], counts))
        stretches[-1][0].append(token)
    return [(tokenizer.decode(ids), counts) for ids, counts in stretches]


ASKED = "### Instruction:\nAdd 1.{}\n\n### Response:\n"
PLAIN: dict[str, list[tuple[str, bool]]] = {
    "alpaca": [("<s>" + ASKED.format("\n\n### Input:\n1 2"), False), ("It is 1</s>", True)],
    "dolly": [("<s>" + ASKED.format("\n\n### Input:\n1 2"), False), ("It is 1</s>", True)],
    "prompt-response": [("<s>" + ASKED.format(""), False), ("It is 1</s>", True)],
    "messages": [
        ("<s>" + ASKED.format(""), False),
        ("It is 1</s>", True),
        ("\n\n### Instruction:\nSure?\n\n### Response:\n", False),
        ("Yes.</s>", True),
    ],
}
TEMPLATED: dict[str, list[tuple[str, bool]]] = {
    "alpaca": [("<s><|user|>Add 1.\n\n1 2<|end|><|assistant|>", False), ("It is 1<|end|>", True)],
    "dolly": [("<s><|user|>Add 1.\n\n1 2<|end|><|assistant|>", False), ("It is 1<|end|>", True)],
    "prompt-response": [("<s><|user|>Add 1.<|end|><|assistant|>", False), ("It is 1<|end|>", True)],
    "messages": [
        ("<s><|user|>Add 1.<|end|><|assistant|>", False),
        ("It is 1<|end|>", True),
        ("<|user|>Sure?<|end|><|assistant|>", False),
        ("Yes.<|end|>", True),
    ],
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_plain_template_and_what_counts_of_it(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    setup = prepare(check(table_of(tiny_llama, tmp_path, kind), "r"))
    assert parts_of(tiny_llama, setup.common[1]) == PLAIN[kind]
    empty = [("<s>" + ASKED.format("").replace("1", "2"), False)]
    assert parts_of(tiny_llama, setup.common[2])[:1] == empty, "an empty input leaves no heading"


@pytest.mark.parametrize("kind", ROWS)
def test_the_tokenizers_chat_template_and_what_counts_of_it(kind: str, chatty: Path, tmp_path: Path) -> None:
    setup = prepare(check(table_of(chatty, tmp_path, kind, template="chat"), "r"))
    assert parts_of(chatty, setup.common[1]) == TEMPLATED[kind]


def test_a_system_message_comes_first_in_the_plain_template(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *ROWS["messages"][1]["messages"]]}] * 4
    setup = prepare(check(table_of(tiny_llama, tmp_path, "messages", rows), "r"))
    assert parts_of(tiny_llama, setup.common[0])[0][0].startswith("<s>Be brief.\n\n### Instruction:\nAdd 1.")


@pytest.mark.parametrize("kind", ["alpaca", "messages"])
def test_the_loss_is_the_mean_over_response_tokens_alone(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    """-log p of each response token, by float64 softmax of the model's own logits, row by row without padding."""
    recipe = check(table_of(tiny_llama, tmp_path, kind), "r")
    setup = prepare(recipe)
    setup.bench.load(setup.start)
    setup.bench.model.eval()
    losses = []
    for example in setup.common:
        with torch.no_grad():
            logits = setup.bench.model(input_ids=torch.tensor([example.ids])).logits[0].double().numpy()
        answers = [text for text, counts in parts_of(tiny_llama, example) if counts]
        count = 0
        for place in range(1, len(example.ids)):
            if example.labels[place] != IGNORED:
                row = logits[place - 1]
                losses.append(math.log(np.exp(row - row.max()).sum()) + row.max() - row[example.ids[place]])
                count += 1
        assert count == sum(len(text.replace("</s>", "!")) for text in answers)  # a token a letter, one for the end
    scores = global_scores(setup, setup.start, None, 3)
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    batch = collate(setup.common, 2, torch.device("cpu"))
    with torch.no_grad():
        assert float(setup.bench.forward(batch).loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_prompts_do_not_teach(tiny_llama: Path, tmp_path: Path) -> None:
    """A prompt's tokens as labels would change the gradient: that of the masked batch is that of the responses' sum."""
    recipe = check(table_of(tiny_llama, tmp_path, "alpaca"), "r")
    setup = prepare(recipe)
    setup.bench.load(setup.start)
    batch = collate(setup.common, 2, torch.device("cpu"))
    setup.bench.model.eval()
    setup.bench.forward(batch).loss.backward()
    found = [p.grad.clone() for p in setup.bench.trainable if p.grad is not None]
    setup.bench.model.zero_grad(set_to_none=True)
    logits = setup.bench.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chances = torch.log_softmax(logits[:, :-1].double(), -1)
    targets = batch["input_ids"][:, 1:]
    counts = (batch["labels"][:, 1:] != IGNORED).double()
    own = -(chances.gather(-1, targets[..., None])[..., 0] * counts).sum() / counts.sum()
    own.backward()
    wanted = [p.grad for p in setup.bench.trainable if p.grad is not None]
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_responses_are_cut_at_their_end_and_prompts_never(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Add.", "response": "x" * 100}, {"prompt": "Add.", "response": "y"}] * 3
    recipe = check(table_of(tiny_llama, tmp_path, "prompt-response", rows, max_length=60), "r")
    setup = prepare(recipe)
    ((prompt, _), (answer, counts)) = parts_of(tiny_llama, setup.common[0])
    assert counts
    assert prompt == "<s>### Instruction:\nAdd.\n\n### Response:\n"
    assert answer == "x" * (60 - (len(prompt) - 2))  # <s> is one token
    assert setup.partition["cut_responses"] == {"train": 3, "test": 3}
    assert setup.partition["left_out"] == {"train": 0, "test": 0}


def test_a_prompt_that_fills_the_window_is_an_error_or_a_counted_row(tiny_llama: Path, tmp_path: Path) -> None:
    long = {"prompt": "Count " + "a" * 200, "response": "No."}
    rows = [{"prompt": "Add.", "response": f"It is {i}"} for i in range(6)]
    table = table_of(tiny_llama, tmp_path, "prompt-response", [rows[0], long, *rows[1:], long], max_length=64)
    with pytest.raises(InputError) as caught:
        prepare(check(table, "r"))
    text = str(caught.value)
    assert "the row that begins 'Count aaa" in text
    assert "1 more of 8 rows" in text
    assert "data.too_long = 'drop'" in text
    table["data"]["too_long"] = "drop"
    recipe = check(table, "r")
    setup = prepare(recipe)
    assert setup.partition["left_out"] == {"train": 2, "test": 2}
    assert len(setup.common) == 6
    held = [row for data in setup.clients.values() for row in (*data.train, *data.test)]
    assert sorted(row.ids for row in held) == sorted(row.ids for row in setup.common), "each kept row once"
    assert plan(recipe, setup).left_out == {"train": 2, "test": 2}
    execute(recipe, tmp_path / "run", setup=setup)
    assert json.loads((tmp_path / "run" / "setup.json").read_text())["left_out"]["train"] == 2
    assert "2 training and 2 test rows left out" in write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    (tmp_path / "prompt-response.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.raises(InputError, match="leaves no room"):
        prepare(recipe)


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("alpaca", {"instruction": "a", "input": "", "answer": "b"}, "has no column 'output'"),
        ("dolly", {"instruction": "a", "output": "b"}, "has no column 'response'"),
        ("messages", {"message": "a"}, "did you mean 'message'"),
        ("alpaca", {"instruction": "a", "output": " "}, "the column 'output' is empty"),
        ("prompt-response", {"prompt": "", "response": "b"}, "the column 'prompt' is empty"),
        ("messages", {"messages": [{"role": "robot", "content": "a"}]}, "is no message"),
        ("messages", {"messages": [{"role": "user"}]}, "is no message"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "the messages come as user"),
        ("messages", {"messages": [{"role": "assistant", "content": "a"}]}, "the messages come as assistant"),
        ("messages", {"messages": "hello"}, "is no message"),
        ("messages", {"messages": []}, "the messages come as an empty list"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named(
    kind: str, row: dict[str, Any], words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        prepare(check(table_of(tiny_llama, tmp_path, kind, [row] * 4), "r"))
    assert words in str(caught.value)
    assert f"{kind}.jsonl" in str(caught.value)


def test_templates_that_cannot_serve_are_explained(chatty: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no chat template"):
        prepare(check(table_of(tiny_llama, tmp_path, "alpaca", template="chat"), "r"))
    rows = [{"messages": [{"role": "system", "content": "x"}, *ROWS["messages"][0]["messages"]]}] * 4
    with pytest.raises(InputError, match="no system messages here"):
        prepare(check(table_of(chatty, tmp_path, "messages", rows, template="chat"), "r"))
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    tokenizer.save_pretrained(chatty)
    with pytest.raises(InputError, match="rewrites earlier turns"):
        prepare(check(table_of(chatty, tmp_path, "messages", template="chat"), "r"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "sequence-classification"}, "data.instructions needs task = 'causal-lm'"),
        ({"data": {"train": "x.jsonl", "template": "chat"}}, "are of data.instructions"),
        ({"data": {"train": "x.jsonl", "too_long": "drop"}}, "are of data.instructions"),
        ({"data": {"train": "x.jsonl", "instructions": "alpacca"}}, "'alpaca', 'dolly', 'prompt-response'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    change: dict[str, Any], words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    table = table_of(tiny_llama, tmp_path, "alpaca", label="output")
    with pytest.raises(RecipeError) as caught:
        check(table | change, "r")
    assert words in str(caught.value)


def test_a_run_learns_the_responses_and_splits_by_a_column(tiny_llama: Path, tmp_path: Path) -> None:
    table = table_of(tiny_llama, tmp_path, "dolly", [*ROWS["dolly"]] * 3)
    table["partition"] = {"kind": "column", "by": "category"}
    table["train"]["steps"] = 12
    execute(check(table, "r"), tmp_path / "run")
    start = json.loads((tmp_path / "run" / "setup.json").read_text())["start"]
    last = read_records(tmp_path / "run" / "rounds.jsonl")[-1].eval
    assert last["global"]["loss"] < start["loss"] - 0.05
    assert set(last["personal"]) == {"loss", "perplexity"}
    setup = prepare(check(table, "r"))
    assert train_locally(setup.bench, setup.clients["client-0"].train, check(table, "r").train, 0, lambda: None) > 0


def test_prompt_and_response_may_have_other_names(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"question": "Add 1.", "answer": "It is 1"}] * 4
    table = table_of(tiny_llama, tmp_path, "prompt-response", rows, text=["question", "answer"])
    assert parts_of(tiny_llama, prepare(check(table, "r")).common[0]) == PLAIN["prompt-response"]
    table["data"]["text"] = ["question", "anser"]
    with pytest.raises(InputError, match="did you mean 'answer'"):
        prepare(check(table, "r"))
    table["data"]["text"] = ["question"]
    with pytest.raises(RecipeError, match="it names two columns"):
        check(table, "r")
