"""What is put into a LoRA layer by forward hooks: cores between fixed factors, and a frozen part beside the LoRA
factors."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from florana.lora.factors import LoraFactors


class Core:
    """Blocks C_1 .. C_h between a layer's fixed factors, as a hook on its A: x A^T becomes x A^T blockdiag(s_k C_k)^T.

    `scale` (s, one value per block) is trained only where asked for, and is multiplied into what `value` returns. Of
    the blocks, those `chosen` (None: all) are parameters; the others act frozen, out of the optimizer's reach.
    """

    def __init__(
        self, linear: torch.nn.Module, blocks: Tensor, trains: Collection[str], chosen: Collection[int] | None = None
    ) -> None:
        device = next(linear.parameters()).device
        own = sorted(range(len(blocks)) if chosen is None else chosen)
        self._sent = blocks.to(device, torch.float32, copy=True)
        self._ones = torch.ones(len(blocks), device=device)
        self._own = torch.tensor(own, device=device)
        self.blocks = torch.nn.Parameter(self._sent[self._own], requires_grad="core" in trains)
        self.scale = torch.nn.Parameter(self._ones[self._own], requires_grad="scale" in trains)
        self._hook = linear.register_forward_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        count, size, _ = self._sent.shape
        inner = output.reshape(*output.shape[:-1], count, size)  # (..., h, k)
        blocks, scale = (whole.to(inner.dtype) for whole in self._whole())
        mixed = torch.einsum("...hk,hjk,h->...hj", inner, blocks, scale)
        return mixed.flatten(-2)

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """The blocks that are trained, and their scales."""
        return self.blocks, self.scale

    def value(self) -> Tensor:
        """s_k C_k, (h, k, k), on the CPU."""
        blocks, scale = self._whole()
        return copied(blocks * scale[:, None, None])

    def _whole(self) -> tuple[Tensor, Tensor]:
        """All blocks (h, k, k) and all scales (h,), trained and frozen."""
        return self._sent.index_copy(0, self._own, self.blocks), self._ones.index_copy(0, self._own, self.scale)

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()


class Residual:
    """A forward hook that adds scaling * x A^T B^T of frozen factors to a module's output."""

    def __init__(self, pair: LoraFactors, device: torch.device) -> None:
        self.B, self.A, self.scaling = pair.B.to(device), pair.A.to(device), pair.scaling

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(self.A.dtype)  # (..., in)
        return output + (self.scaling * F.linear(F.linear(x, self.A), self.B)).to(output.dtype)


def copied(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU, outside any graph."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
