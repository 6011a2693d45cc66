"""The adapters of several clients in one model: every trained tensor with a leading axis of clients, applied by hooks.

    rows of all clients, one client's after the other's  ->  frozen base, once
                     |                                              |
                     +-> (clients, rows x time, in) A^T B^T per client -> +

PEFT's own layers are switched off meanwhile, and on again after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.func import functional_call

from florana.lora.factors import Adapter, LoraFactors
from florana.train.model import Workbench
from florana.train.own_streams import OwnStreams
from florana.train.targets import PREFIX


@dataclass
class Present:
    """Whose rows the batch holds, of each equally many.

    Args:
        clients: their places in the stack, (k,).
        all: whether these are all there are.
        streams: what each client's dropout draws from.
    """

    clients: Tensor
    all: bool
    streams: OwnStreams

    def of(self, stack: Tensor) -> Tensor:
        """The part of a stack (clients, ...) that belongs to the batch."""
        return stack if self.all else stack[self.clients]


class StackedPair:
    """A forward hook on a LoRA layer that adds to each client's rows scaling * x A_u^T B_u^T, with its core or DoRA's
    magnitude where there is one."""

    def __init__(self, pairs: Sequence[LoraFactors], trains: Collection[str], device: torch.device, present: Present):
        self.A = parameter([pair.A for pair in pairs], device, "A" in trains)  # (clients, r, in)
        self.B = parameter([pair.B for pair in pairs], device, "B" in trains)  # (clients, out, r)
        self.scaling, self.present = pairs[0].scaling, present
        self.core: StackedCore | None = None
        self.magnitude: torch.nn.Parameter | None = None  # (clients, out)

    def __call__(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        A, B = self.present.of(self.A), self.present.of(self.B)
        x = args[0].to(A.dtype)
        dropped: Tensor = layer.lora_dropout["default"](x)
        inner = dropped.reshape(len(A), -1, A.shape[2]) @ A.mT
        if self.core is not None:
            inner = self.core(inner)
        added = self.scaling * (inner @ B.mT).reshape(output.shape)
        if self.magnitude is None:
            return (output + added).to(output.dtype)
        return (output + self._scaled(layer, dropped, output, added, dropped is x)).to(output.dtype)

    def _scaled(self, layer: Any, x: Tensor, output: Tensor, added: Tensor, whole: bool) -> Tensor:
        """DoRA's (c - 1) W x + c s B A x with c = m / || W + s B A ||, each row's norm outside the graph."""
        assert self.magnitude is not None
        base = layer.get_base_layer()
        stored: Tensor = dequantize_module_weight(base)
        weight = (stored.T if layer.fan_in_fan_out else stored).to(self.A.dtype)  # (out, in)
        with torch.no_grad():
            A, B, s = self.present.of(self.A), self.present.of(self.B), self.scaling
            cross = ((weight @ A.mT) * B).sum(-1)  # <W, B A> by rows, (clients, out)
            square = weight.square().sum(-1) + 2 * s * cross + s * s * ((B @ (A @ A.mT)) * B).sum(-1)
        c = self.present.of(self.magnitude) / square.sqrt()  # (clients, out)
        straight: Tensor = output if whole else base(x.to(output.dtype))
        straight = straight if base.bias is None else straight - base.bias
        split = (len(c), -1, c.shape[1])
        both = (c - 1)[:, None] * straight.reshape(split) + c[:, None] * added.reshape(split)
        return both.reshape(output.shape)


class StackedCore:
    """Blocks between fixed factors, each client's own: of each core those that it `chose` are trained."""

    def __init__(
        self,
        cores: Sequence[Tensor],
        chosen: Sequence[Collection[int] | None],
        trains: Collection[str],
        device: torch.device,
        present: Present,
    ) -> None:
        self._sent = torch.stack([core.to(device, torch.float32) for core in cores])  # (clients, h, k, k)
        self._ones = torch.ones(self._sent.shape[:2], device=device)
        rows = [sorted(range(len(core)) if own is None else own) for core, own in zip(cores, chosen, strict=True)]
        self._at = (torch.arange(len(rows), device=device)[:, None], torch.tensor(rows, device=device))
        self.blocks = torch.nn.Parameter(self._sent[self._at], requires_grad="core" in trains)
        self.scale = torch.nn.Parameter(self._ones[self._at], requires_grad="scale" in trains)
        self.present = present

    def __call__(self, inner: Tensor) -> Tensor:
        blocks, scale = (self.present.of(whole).to(inner.dtype) for whole in self._whole())
        count, size = blocks.shape[1:3]
        apart = inner.reshape(*inner.shape[:2], count, size)  # (clients, n, h, k)
        return torch.einsum("cnhk,chjk,ch->cnhj", apart, blocks, scale).flatten(-2)

    def value(self) -> Tensor:
        """s_k C_k of every client, (clients, h, k, k)."""
        blocks, scale = self._whole()
        return (blocks * scale[:, :, None, None]).detach()

    def _whole(self) -> tuple[Tensor, Tensor]:
        return self._sent.index_put(self._at, self.blocks), self._ones.index_put(self._at, self.scale)


class StackedWhole:
    """What stands in the place of a module that is trained whole (a head): each client's rows through its own.

    In its place and no hook behind it: the module itself would draw from the clients' streams for nothing.
    """

    def __init__(self, wrapper: Any, name: str, extras: Sequence[Mapping[str, Tensor]], device: torch.device,
                 present: Present) -> None:  # fmt: skip
        self.module, self.name, self.present = wrapper.modules_to_save["default"], name, present
        self.parameters = {
            inner: parameter([extra[f"{name}.{inner}"] for extra in extras], device, True)
            for inner, _ in self.module.named_parameters()
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        count = len(self.present.clients)
        if type(self.module) is torch.nn.Linear and len(args) == 1 and not kwargs:
            return self._at_once(args[0], count)
        rows = [_split(value, count) for value in args]
        named = {key: _split(value, count) for key, value in kwargs.items()}
        stacks = {inner: self.present.of(stack) for inner, stack in self.parameters.items()}
        answers = []
        for place in range(count):
            own = {inner: stack[place] for inner, stack in stacks.items()}
            with self.present.streams.alone(place):
                given = {key: parts[place] for key, parts in named.items()}
                answers.append(functional_call(self.module, own, tuple(parts[place] for parts in rows), given))
        return torch.cat(answers)

    def _at_once(self, rows: Tensor, count: int) -> Tensor:
        """x W_u^T + b_u of a plain linear map, of all clients in one product."""
        weight = self.present.of(self.parameters["weight"])
        given = rows.to(weight.dtype) if rows.dtype != weight.dtype and not torch.is_autocast_enabled() else rows
        answer = given.reshape(count, -1, rows.shape[-1]) @ weight.mT
        if "bias" in self.parameters:
            answer = answer + self.present.of(self.parameters["bias"])[:, None]
        return answer.reshape(*rows.shape[:-1], -1)


class Stack:
    """All that several clients train, as stacks on the model of a bench.

    Args:
        bench: the model; what is on it is switched off while `placed`.
        adapters: of the clients, of equal shapes and scalings.
        trains: the kinds of tensors that get gradients.
        blocks: of each client's cores those that it trains; None for all.
        present: whose rows a batch holds, set before each.
    """

    def __init__(
        self,
        bench: Workbench,
        adapters: Sequence[Adapter],
        trains: Collection[str],
        blocks: Sequence[Collection[int] | None],
        present: Present,
    ) -> None:
        self._bench, first = bench, adapters[0]
        self.pairs = {
            name: StackedPair([adapter.modules[name] for adapter in adapters], trains, bench.device, present)
            for name in first.modules
        }
        for name, pair in self.pairs.items():
            if name in first.cores:
                cores = [adapter.cores[name] for adapter in adapters]
                pair.core = StackedCore(cores, blocks, trains, bench.device, present)
            if (vector := f"{name}.lora_magnitude_vector") in first.extra:
                pair.magnitude = parameter([adapter.extra[vector] for adapter in adapters], bench.device, True)
        extras = [adapter.extra for adapter in adapters]
        self.wholes = {
            name: StackedWhole(wrapper, name, extras, bench.device, present)
            for name, wrapper in _wrappers(bench.model).items()
        }

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """The stacks in the place of the bench's own adapter."""
        layers, hooks = self._bench.layers, []
        wrappers = _wrappers(self._bench.model)
        try:
            for name, pair in self.pairs.items():
                layers[name].enable_adapters(False)
                hooks.append(layers[name].register_forward_hook(pair, prepend=True))
            for name, whole in self.wholes.items():
                wrappers[name].forward = whole
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in self.wholes:
                del wrappers[name].forward
            for name in self.pairs:
                layers[name].enable_adapters(True)

    def stacks(self) -> dict[str, Tensor]:
        """Every parameter by a name that `adapter` reads it by, each (clients, ...)."""
        found: dict[str, Tensor] = {}
        for name, pair in self.pairs.items():
            found[f"A/{name}"], found[f"B/{name}"] = pair.A, pair.B
            if pair.core is not None:
                found[f"core/{name}"] = pair.core.value()
            if pair.magnitude is not None:
                found[f"extra/{name}.lora_magnitude_vector"] = pair.magnitude
        for name, whole in self.wholes.items():
            found |= {f"extra/{name}.{inner}": stack for inner, stack in whole.parameters.items()}
        return found

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """What an optimizer moves."""
        found = list(self.stacks().values())
        cores = [core for pair in self.pairs.values() if (core := pair.core) is not None]
        found += [parameter for core in cores for parameter in (core.blocks, core.scale)]
        return [stack for stack in found if isinstance(stack, torch.nn.Parameter) and stack.requires_grad]

    @property
    def trained_names(self) -> list[str]:
        """The names, in `stacks`, of what an optimizer moves; cores are not among them."""
        trained = {id(parameter) for parameter in self.trainable}
        return [name for name, stack in self.stacks().items() if id(stack) in trained]

    @property
    def second(self) -> list[Tensor]:
        """The factors B."""
        return [pair.B for pair in self.pairs.values()]

    def factors(self, client: int) -> dict[str, LoraFactors]:
        """Module name -> views of what that client trains."""
        return {name: LoraFactors(pair.B[client], pair.A[client], pair.scaling) for name, pair in self.pairs.items()}


def parameter(tensors: Sequence[Tensor], device: torch.device, trained: bool) -> torch.nn.Parameter:
    """Tensors of one shape as one parameter with an axis before."""
    return torch.nn.Parameter(torch.stack(list(tensors)).to(device), requires_grad=trained)


def _wrappers(model: Any) -> dict[str, Any]:
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _split(value: Any, count: int) -> Sequence[Any]:
    return value.chunk(count) if isinstance(value, Tensor) else [value] * count
