"""Scores of the model on the bench: scikit-learn's and SciPy's metrics, loss and perplexity for language."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from florana.train.data.tokenize import IGNORED, Example, batches
from florana.train.probe import Probed


def evaluate(bench: Probed, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
    """The figures that the model's output allows.

    Classes: accuracy, macro_f1, matthews, loss; of two classes also f1, that of the second one, as GLUE has it. A
    score: pearson, spearman, and loss, the mean squared error. Language: loss (nats per token that counts) and
    perplexity.

    Args:
        bench: the model, with the adapter to measure.
        examples: the rows.
        batch_size: rows at once.
    """
    bench.model.eval()
    ordered = sorted(examples, key=lambda example: len(example.ids))  # little padding
    total, count = 0.0, 0
    outputs: list[Tensor] = []
    with torch.inference_mode():
        for rows in batches(ordered, batch_size, lambda row: len(row.ids), together=bench.padding is not None):
            batch = bench.batch(rows)
            labels = batch.pop("labels")
            logits = bench.forward(batch).logits.float()
            if labels.is_floating_point():
                total += float(F.mse_loss(logits.squeeze(-1), labels, reduction="sum"))
                count += len(labels)
                outputs.append(logits.squeeze(-1).cpu())
                continue
            if labels.ndim == 2:  # next-token: position t predicts token t + 1
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            else:
                outputs.append(logits.cpu())
            total += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            count += int((labels != IGNORED).sum())
    loss = total / max(count, 1)
    if not outputs:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    truth, given = [example.labels[0] for example in ordered], torch.cat(outputs)
    figures = correlations(truth, given.tolist()) if given.ndim == 1 else class_figures(truth, given)
    return figures | {"loss": loss}


def class_figures(truth: Sequence[float], logits: Tensor) -> dict[str, float]:
    """accuracy, macro_f1, matthews, and f1 of the second of two classes, of logits (rows, classes).

    Examples:
        >>> class_figures([1, 1, 0], torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))["f1"].__round__(4)
        0.6667
    """
    predicted = logits.argmax(-1).tolist()
    constant = len(set(truth)) == 1 and len(set(predicted)) == 1  # Matthews is undefined there; 0 by convention
    figures = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "matthews": 0.0 if constant else float(matthews_corrcoef(truth, predicted)),
    }
    if logits.shape[1] == 2:
        figures["f1"] = float(f1_score(truth, predicted, pos_label=1, zero_division=0.0))
    return figures


def correlations(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's r, and Spearman's rho with ties at their mean rank; 0 where one side does not vary.

    Examples:
        >>> correlations([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])["spearman"]
        1.0
    """
    if len(set(truth)) < 2 or len(set(predicted)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(truth, predicted).statistic),
        "spearman": float(stats.spearmanr(truth, predicted).statistic),
    }
