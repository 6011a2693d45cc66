"""Whether a model keeps the rows of one batch apart: two made-up clients step together, and each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from florana.errors import InputError
from florana.lora.factors import Adapter, LoraFactors
from florana.recipe.train_schema import Train
from florana.train.client import train_locally
from florana.train.cohort import Member, train_together
from florana.train.data.tokenize import Example
from florana.train.model import Workbench
from florana.train.probe import rows_of_probe

APART = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""By the base's dtype, how far the two steps may lie apart, relative to the step."""
STEP = Train(steps=1, batch_size=2, optimizer="sgd", momentum=0.0, learning_rate=1.0, max_grad_norm=None)


def require_together(bench: Workbench, base: str) -> None:
    """Raise InputError where a client's step depends on who steps with it. Leaves a made-up adapter on the bench.

    Args:
        bench: the model.
        base: its name, for the message.
    """
    fix = "set engine.cohort = 1"
    task = "causal-lm" if bench.card.task_type == "CAUSAL_LM" else _task(bench)
    rows = rows_of_probe(bench, task)
    draws = torch.Generator().manual_seed(0)
    members = [Member(_made_up(bench.adapter(), draws), own, seed) for seed, own in enumerate((rows, _backwards(rows)))]
    try:
        bench.load(members[0].adapter)
        together = train_together(bench, members, STEP, ("A", "B"))
        alone = []
        for member in members:
            bench.load(member.adapter)
            train_locally(bench, member.examples, STEP, member.seed, lambda: None)
            alone.append(bench.adapter().tensors())
    except Exception as error:  # models raise what they like
        raise InputError(
            f"engine.cohort does not go with the model '{base}'",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix=fix,
        ) from None
    dtype = next(iter(bench.weights().values()))[0].dtype
    for member, result, own in zip(members, together, alone, strict=True):
        assert isinstance(result, tuple)
        before = member.adapter.tensors()
        off = sum(float((result[0][name] - tensor).square().sum()) for name, tensor in own.items())
        step = sum(float((before[name] - tensor).square().sum()) for name, tensor in own.items())
        if not off <= APART.get(dtype, APART[torch.float32]) ** 2 * step:
            raise InputError(
                f"engine.cohort does not go with the model '{base}'",
                why="a client's step depends on whose rows are in the batch with its own",
                fix=fix,
            )


def _backwards(rows: Sequence[Example]) -> list[Example]:
    """Other rows of the same lengths: so both clients' dropout draws as much together as alone."""
    return [replace(row, ids=row.ids[::-1], kinds=row.kinds[::-1], labels=row.labels[::-1]) for row in rows]


def _made_up(adapter: Adapter, draws: torch.Generator) -> Adapter:
    """The adapter with a B of random numbers, so that all that is trained has a gradient."""
    modules = {
        name: LoraFactors(0.1 * torch.randn(pair.B.shape, generator=draws), pair.A, pair.scaling)
        for name, pair in adapter.modules.items()
    }
    return Adapter(modules, adapter.extra)


def _task(bench: Workbench) -> str:
    return "sequence-regression" if bench.model.config.problem_type == "regression" else "sequence-classification"
