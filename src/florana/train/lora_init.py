"""LoRA initialisation other than PEFT's: from the leading singular vectors of the base weights, or of their first
gradient.

    principal   W = L S V^T:             B = L_r sqrt(S_r / s),  A = sqrt(S_r / s) V_r^T      (FRLoRA, ICLR 2025)
    gradient    -eta sign(mean gradient): the same of that matrix: the first step of an Adam-like optimizer, as Fed-SB
                                         (arXiv 2502.15436) begins

Both belong to the start of a run, before anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from florana.errors import InputError
from florana.lora import linalg
from florana.lora.factors import Adapter
from florana.train.data.tokenize import Example
from florana.train.model import Workbench

FULL_UP_TO = 1024
"""A matrix with a side of at most this many is decomposed whole; a larger one by a seeded randomised method."""


def principal(bench: Workbench, start: Adapter) -> Adapter:
    """Factors of `start`'s ranks and scalings whose products are the best rank-r parts of the base weights.

    Raises:
        InputError: the base is quantised: its singular vectors cannot be read.
    """
    matrices = {}
    for name, (weight, transposed) in bench.weights().items():
        if not weight.is_floating_point():
            raise InputError(
                f"module '{name}' is stored as {weight.dtype}",
                why="this strategy starts from the singular vectors of the base weights, which need them unquantised",
                fix="set model.quantization = 'none', or choose another strategy",
            )
        matrices[name] = _upright(weight.detach(), transposed)
    return _pairs(matrices, start)


def gradient(bench: Workbench, start: Adapter, batches: Mapping[str, Sequence[Example]], rate: float) -> Adapter:
    """Factors of -rate times the sign of the clients' mean gradient of the base weights: client -> the rows of a batch.

    Clients count by their rows. The gradients are pooled, which only a simulation can do (as the published code does).
    """
    bench.load(start)
    weights = bench.weights()
    total = sum(len(rows) for rows in batches.values())
    bench.model.eval()
    try:
        for weight, _ in weights.values():
            weight.requires_grad_(True)
        for _, rows in sorted(batches.items()):
            batch = bench.batch(rows)
            (bench.forward(batch).loss * (len(rows) / total)).backward()
        matrices = {
            name: -rate * torch.sign(_upright(weight.grad, transposed))
            for name, (weight, transposed) in weights.items()
            if weight.grad is not None
        }
    finally:
        for weight, _ in weights.values():
            weight.requires_grad_(False)
        bench.model.zero_grad(set_to_none=True)
    return _pairs(matrices, start)


def _upright(weight: Tensor, transposed: bool) -> Tensor:
    """The weight as (out, in) in float32 on the CPU."""
    matrix = weight.to("cpu", torch.float32)
    return matrix.T if transposed else matrix


def _pairs(matrices: Mapping[str, Tensor], start: Adapter) -> Adapter:
    modules = dict(start.modules)  # a module that no row reaches keeps the factors it has
    for name, matrix in matrices.items():
        pair = start.modules[name]
        if min(matrix.shape) <= FULL_UP_TO:
            left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                left, values, right = torch.svd_lowrank(matrix, q=2 * pair.rank + 8, niter=4)
            left, values, right = left.double(), values.double(), right.T.double()
        largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))  # (1, k)
        sign = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
        whole = linalg.kept(linalg.Decomposition(left * sign, values, right * sign.T), pair.rank)
        modules[name] = linalg.balanced(whole, pair.scaling, pair.A.dtype)
    return Adapter(modules, start.extra)
