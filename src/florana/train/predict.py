"""What a finished model answers to texts: classes with probabilities, a score, or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from florana.errors import InputError
from florana.recipe.usage import Usage
from florana.train.data.instructions import prompt_of
from florana.train.data.tokenize import batches, encode_classes
from florana.train.finished import Finished
from florana.train.generate import generate
from florana.train.limits import check_rows

Answer = dict[str, Any]


def classify(model: Finished, texts: Sequence[tuple[str, ...]], batch_size: int = 32) -> list[Answer]:
    """Of each text (or pair) the class with its probability, and those of all; of a regression the score.

    Args:
        model: the finished model.
        texts: one or two strings each.
        batch_size: rows at once.

    Raises:
        InputError: a text that the model cannot take.
    """
    usage = model.usage
    rows = encode_classes(texts, [0] * len(texts), model.tokenizer, usage.max_length)
    check_rows(model, {"the texts": dict(enumerate(rows))})
    answers: dict[int, Answer] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    with torch.inference_mode():
        for chosen in batches(order, batch_size, lambda i: len(rows[i].ids), together=model.padding is not None):
            batch = model.batch([rows[index] for index in chosen])
            del batch["labels"]
            logits = model.forward(batch).logits.float().cpu()
            for index, line in zip(chosen, logits, strict=True):
                answers[index] = _answer(line, usage)
    return [{"text": " | ".join(texts[index]), **answers[index]} for index in range(len(texts))]


def write(
    model: Finished, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, samples: int, seed: int
) -> list[Answer]:
    """What the model writes after each prompt, put as it was trained to be asked.

    Args:
        model: the finished model.
        prompts: the texts.
        max_new_tokens: of one answer.
        temperature: 0 is greedy.
        samples: answers per prompt.
        seed: of the draws.

    Raises:
        InputError: no room for the answers, or a chat template that refuses a prompt.
    """
    usage = model.usage
    asked = [prompt_of(text, usage.instructions, usage.template, model.tokenizer) for text in prompts]
    written = generate(
        model,
        asked,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        seed=seed,
        opening=() if usage.template == "chat" else None,
    )
    return [
        {"prompt": prompt, "completion": text}
        for prompt, texts in zip(prompts, written.texts, strict=True)
        for text in texts
    ]


def _answer(logits: torch.Tensor, usage: Usage) -> Answer:
    if usage.task == "sequence-regression":
        return {"score": float(logits[0])}
    if len(usage.labels) != len(logits):
        raise InputError(
            f"{len(usage.labels)} classes are named, and the model tells {len(logits)} apart",
            fix="name them all by --labels, in the order of the model's outputs",
        )
    shares = torch.softmax(logits, 0).tolist()
    best = max(range(len(shares)), key=shares.__getitem__)
    return {
        "label": usage.labels[best],
        "probability": shares[best],
        "probabilities": dict(zip(usage.labels, shares, strict=True)),
    }
