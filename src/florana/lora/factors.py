"""The records everything else speaks of: LoRA factors, adapters, and what clients contribute. No I/O.

A LoRA module changes a frozen weight W (out x in) by `scaling * B @ A` with B (out x r) and A (r x in),
`scaling = alpha / r`, or `alpha / sqrt(r)` under rsLoRA (Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv
2312.03732). The factors do not depend on the layout of W: a Conv1D weight (in x out) takes the transpose of the
product, which is the model's business.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from florana.errors import InputError


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One module's LoRA factors: the update is `scaling * B @ A`.

    Args:
        B: (out, r), floating point.
        A: (r, in), of the same dtype and device as B.
        scaling: finite and positive.

    Raises:
        InputError: the two shapes, dtypes or devices do not fit, or the scaling is not a positive number.

    Examples:
        >>> import torch
        >>> pair = LoraFactors(B=torch.ones(4, 2), A=torch.ones(2, 3), scaling=0.5)
        >>> pair.rank, pair.shape
        (2, (4, 3))
    """

    B: Tensor  # (out, r)
    A: Tensor  # (r, in)
    scaling: float

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0] or self.B.shape[1] == 0:
            raise InputError(
                f"LoRA factors do not fit: B is {tuple(self.B.shape)}, A is {tuple(self.A.shape)}",
                why="B must be (out, r) and A (r, in) with the same rank r of at least 1",
            )
        if self.A.dtype != self.B.dtype or not self.A.is_floating_point():
            raise InputError(
                f"LoRA factors do not fit: B is {self.B.dtype}, A is {self.A.dtype}",
                why="both must have one floating-point type",
            )
        if self.A.device != self.B.device:
            raise InputError(f"LoRA factors do not fit: B is on {self.B.device}, A is on {self.A.device}")
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise InputError(f"the LoRA scaling {self.scaling} is not a positive number")

    @property
    def rank(self) -> int:
        """r, the inner dimension."""
        return int(self.B.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of the product."""
        return int(self.B.shape[0]), int(self.A.shape[1])


@dataclass(frozen=True, eq=False)
class Adapter:
    """All adapted modules by name, and the tensors that are trained whole (a classifier head). Sorted by name.

    Args:
        modules: module name (as in the base model) -> factors; at least one.
        extra: parameter name -> tensor.
        cores: module name -> (h, k, k) blocks with h k = r, for methods that train small matrices between fixed
            factors: the module's update is then `scaling * B @ blockdiag(core) @ A`. Empty for plain LoRA.

    Raises:
        InputError: no module at all, or a core that does not fit its module.
    """

    modules: Mapping[str, LoraFactors]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    cores: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules:
            raise InputError("an adapter without a single LoRA module")
        for name, core in self.cores.items():
            if name not in self.modules:
                raise InputError(f"a core for module '{name}', which the adapter does not have")
            rank = self.modules[name].rank
            if core.ndim != 3 or core.shape[1] != core.shape[2] or core.shape[0] * core.shape[1] != rank:
                raise InputError(
                    f"module '{name}': the core is {tuple(core.shape)}, the rank is {rank}",
                    why="a core is (h, k, k) with h k equal to the rank",
                )
        object.__setattr__(self, "cores", MappingProxyType(dict(sorted(self.cores.items()))))
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))
        object.__setattr__(self, "extra", MappingProxyType(dict(sorted(self.extra.items()))))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a name that says what it is: `A/<module>`, `B/<module>`, `core/...`, `extra/<name>`."""
        named: dict[str, Tensor] = {}
        for name, pair in self.modules.items():
            named[f"A/{name}"], named[f"B/{name}"] = pair.A, pair.B
        named |= {f"core/{name}": core for name, core in self.cores.items()}
        return named | {f"extra/{name}": tensor for name, tensor in self.extra.items()}

    @property
    def scalings(self) -> dict[str, float]:
        """Module name -> scaling."""
        return {name: pair.scaling for name, pair in self.modules.items()}

    @property
    def parameters(self) -> int:
        """How many parameters the adapter holds, the extra tensors included."""
        return sum(tensor.numel() for tensor in self.tensors().values())


def adapter_from_tensors(tensors: Mapping[str, Tensor], scalings: Mapping[str, float]) -> Adapter:
    """The inverse of `Adapter.tensors`; `scalings` names the modules and their scalings."""
    modules = {
        name: LoraFactors(B=tensors[f"B/{name}"], A=tensors[f"A/{name}"], scaling=scaling)
        for name, scaling in scalings.items()
    }
    extra = {name.removeprefix("extra/"): t for name, t in tensors.items() if name.startswith("extra/")}
    cores = {name.removeprefix("core/"): t for name, t in tensors.items() if name.startswith("core/")}
    return Adapter(modules, extra, cores)


def kind_of(tensor: str) -> str:
    """What a name of `Adapter.tensors` denotes: `A`, `B`, `core` or `extra`.

    Examples:
        >>> kind_of("A/layer.0.query")
        'A'
    """
    return tensor.partition("/")[0]


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one client brings to an aggregation.

    Args:
        client: its name.
        adapter: what it trained.
        weight: any positive scale; in `aggregate.signed.weighted_sum` any finite number.
        residual: the frozen part it carried unchanged beside the adapter: it belongs to what the client's model was.
        blocks: the blocks of its cores that it trained, None for all; the others it holds as they were sent.
    """

    client: str
    adapter: Adapter
    weight: float
    residual: Adapter | None = None
    blocks: Collection[int] | None = None


@dataclass(frozen=True, eq=False)
class Update:
    """What one client sent in a round, after the gate let it through.

    Args:
        client: its name.
        round: counted from 1.
        adapter: what it sent, completed by what it was sent.
        examples: the number of its training rows.
        metrics: what it measured while training.
        measured: what it sent in the place of its factors, where the method works on sums; its adapter is then the one
            that it was sent.
    """

    client: str
    round: int
    adapter: Adapter
    examples: int
    metrics: Mapping[str, float]
    measured: Mapping[str, Tensor] = field(default_factory=dict)
