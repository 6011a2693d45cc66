"""Scores of the model on the bench: scikit-learn's metrics for classes, loss and perplexity for language."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from florana.train.model import Workbench
from florana.train.tasks import IGNORED, Example, collate


def evaluate(bench: Workbench, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
    """accuracy, macro_f1, matthews and loss for classes; loss (nats per token) and perplexity for language."""
    bench.model.eval()
    ordered = sorted(examples, key=lambda example: len(example.ids))  # little padding
    total, count = 0.0, 0
    predicted: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], bench.tokenizer.pad_token_id, bench.device)
            labels = batch.pop("labels")
            logits = bench.forward(batch).logits.float()
            if labels.ndim == 2:  # next-token: position t predicts token t + 1
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            else:
                predicted += logits.argmax(-1).tolist()
            total += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            count += int((labels != IGNORED).sum())
    loss = total / max(count, 1)
    if not predicted:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    truth = [example.labels[0] for example in ordered]
    constant = len(set(truth)) == 1 and len(set(predicted)) == 1  # Matthews is undefined there; 0 by convention
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "matthews": 0.0 if constant else float(matthews_corrcoef(truth, predicted)),
        "loss": loss,
    }
