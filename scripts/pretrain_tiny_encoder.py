"""Pretrain the demonstration's encoder on the text of the Python standard library, from nothing.

    python scripts/pretrain_tiny_encoder.py --out src/florana/demo/tiny-encoder

A WordPiece vocabulary and a BERT of about 0.7 million parameters (3 layers, hidden 96) are trained by the two
original objectives (masked words; do two passages come from the same file), on the comments of all modules and
the docstrings outside the held-out share of `florana.train.data.docstrings`. The weights are stored in bfloat16.
About half an hour on two cores. Seeded: the same Python, torch and vocabulary give the same bytes. The
vocabulary is the committed one, since its trainer breaks ties at random; `--train-vocabulary` makes a new one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

from florana.train.data.docstrings import comments, docstrings, source_files

LENGTH = 64  # tokens
VOCABULARY = 4096  # pieces
COMMITTED = Path(__file__).resolve().parent.parent / "src" / "florana" / "demo" / "tiny-encoder"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def corpus() -> list[list[str]]:
    """One list of passages per source module file; no held-out docstring among them."""
    texts = docstrings()
    held_out = {text.text for text in texts if text.held_out}
    by_module: dict[str, list[str]] = {}
    for text in texts:
        if text.text not in held_out:
            by_module.setdefault(text.module, []).append(text.text)
    groups = [group for _, group in sorted(by_module.items())]
    for _, path in source_files():
        groups.append([text for text in comments(path) if text not in held_out])
    return [group for group in groups if group]


def train_tokenizer(groups: list[list[str]]) -> BertTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator((text for group in groups for text in group), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=128)


def passages(groups: list[list[str]], tokenizer: BertTokenizerFast) -> list[list[list[int]]]:
    """Each group's text as runs of at most half a sequence of token ids."""
    half = (LENGTH - 3) // 2
    result = []
    for group in groups:
        runs: list[list[int]] = []
        for ids in tokenizer(group, add_special_tokens=False)["input_ids"]:
            if runs and len(runs[-1]) + len(ids) <= half:  # join short neighbours: fewer padded positions
                runs[-1] = runs[-1] + ids
            else:
                runs += [ids[start : start + half] for start in range(0, len(ids), half)]
        result.append([run for run in runs if len(run) >= 4])
    return [group for group in result if len(group) >= 2]


def batch(groups: list[list[list[int]]], size: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    weights = np.array([len(group) for group in groups], dtype=float)
    chosen = rng.choice(len(groups), size=size, p=weights / weights.sum())
    ids = np.zeros((size, LENGTH), dtype=np.int64)
    kinds = np.zeros_like(ids)
    same = rng.random(size) < 0.5
    for row, index in enumerate(chosen):
        group = groups[index]
        place = int(rng.integers(len(group) - 1))
        first = group[place]
        other = group if same[row] else groups[int(rng.integers(len(groups)))]
        second = other[place + 1] if same[row] else other[int(rng.integers(len(other)))]
        tokens = [2, *first, 3, *second, 3]
        ids[row, : len(tokens)] = tokens
        kinds[row, len(first) + 2 : len(tokens)] = 1
    labels = np.full_like(ids, -100)
    maskable = ids >= len(SPECIAL)
    picked = maskable & (rng.random(ids.shape) < 0.15)
    labels[picked] = ids[picked]
    dice = rng.random(ids.shape)
    attention = (ids != 0).astype(np.int64)
    ids[picked & (dice < 0.8)] = 4
    random_words = picked & (dice >= 0.9)
    ids[random_words] = rng.integers(len(SPECIAL), VOCABULARY, size=int(random_words.sum()))
    columns = {
        "input_ids": ids,
        "token_type_ids": kinds,
        "attention_mask": attention,
        "labels": labels,
        "next_sentence_label": (~same).astype(np.int64),
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def masked_loss(model: BertForPreTraining, groups: list[list[list[int]]], batches: int) -> float:
    rng = np.random.default_rng(1)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for _ in range(batches):
            data = batch(groups, 64, rng)
            logits = model(**{k: v for k, v in data.items() if "label" not in k}).prediction_logits
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten()))
    model.train()
    return total / batches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-vocabulary", action="store_true", help="instead of taking the committed one")
    arguments = parser.parse_args()
    torch.set_num_threads(2)  # part of what makes the bytes the same again
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)

    texts = corpus()
    tokenizer = train_tokenizer(texts) if arguments.train_vocabulary else BertTokenizerFast.from_pretrained(COMMITTED)
    groups = passages(texts, tokenizer)
    held_back = groups[::20]  # a twentieth of the modules and files, only to measure the loss
    groups = [group for index, group in enumerate(groups) if index % 20]
    tokens = sum(len(run) for group in groups for run in group)
    print(f"{len(texts)} files, {tokens} tokens, vocabulary {len(tokenizer)}", flush=True)

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForPreTraining(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    warmup = arguments.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / arguments.steps))),
    )
    before = masked_loss(model, held_back, 10)
    print(f"masked-word loss before: {before:.4f}", flush=True)
    start = time.perf_counter()
    model.train()
    for step in range(arguments.steps):
        loss = model(**batch(groups, 64, rng)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            held = masked_loss(model, held_back, 10)
            spent = time.perf_counter() - start
            print(
                f"step {step + 1}: loss {float(loss):.3f}, held-back masked {held:.4f}, {spent:.0f} s",
                flush=True,
            )
    after = masked_loss(model, held_back, 10)
    print(f"masked-word loss after: {after:.4f}", flush=True)
    encoder = model.bert.to(torch.bfloat16)
    encoder.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    digest = hashlib.sha256((arguments.out / "model.safetensors").read_bytes()).hexdigest()
    facts = {"steps": arguments.steps, "seed": arguments.seed, "loss_before": before, "loss_after": after}
    (arguments.out / "pretraining.json").write_text(json.dumps({**facts, "sha256": digest}, indent=1) + "\n")


if __name__ == "__main__":
    main()
