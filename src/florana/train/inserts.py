"""What is put into a LoRA layer by forward hooks: cores between fixed factors, and a frozen part beside the pair."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from florana.factors import LoraFactors


class Core:
    """Blocks C_1 .. C_h between a layer's fixed factors, as a hook on its A: x A^T becomes x A^T blockdiag(s_k C_k)^T.

    `scale` (s, one number per block) is trained only where asked for, and is multiplied into what `value` returns.
    """

    def __init__(self, linear: torch.nn.Module, blocks: Tensor, trains: Collection[str]) -> None:
        device = next(linear.parameters()).device
        self.blocks = torch.nn.Parameter(blocks.to(device, torch.float32, copy=True), requires_grad="core" in trains)
        self.scale = torch.nn.Parameter(torch.ones(len(blocks), device=device), requires_grad="scale" in trains)
        self._hook = linear.register_forward_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        count, size, _ = self.blocks.shape
        inner = output.reshape(*output.shape[:-1], count, size)  # (..., h, k)
        mixed = torch.einsum("...hk,hjk,h->...hj", inner, self.blocks.to(inner.dtype), self.scale.to(inner.dtype))
        return mixed.flatten(-2)

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """The blocks and their scales."""
        return self.blocks, self.scale

    def value(self) -> Tensor:
        """s_k C_k, (h, k, k), on the CPU."""
        return copied(self.blocks * self.scale[:, None, None])

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()


class Residual:
    """A forward hook that adds scaling * x A^T B^T of a frozen pair to a module's output."""

    def __init__(self, pair: LoraFactors, device: torch.device) -> None:
        self.B, self.A, self.scaling = pair.B.to(device), pair.A.to(device), pair.scaling

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(self.A.dtype)  # (..., in)
        return output + (self.scaling * F.linear(F.linear(x, self.A), self.B)).to(output.dtype)


def copied(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU, outside any graph."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
