"""How many singular components of each module go out: by rank, by share of the energy, by error, or by a budget.

    energy     the least k with sum_{i<=k} S_i^2 >= tau sum_i S_i^2          per module (FLoRIST, arXiv 2506.09199)
    error      the least k with sqrt(sum_{i>k} S_i^2) <= e || target ||_F     per module: energy with tau = 1 - e^2
    budget     the components of all modules with the largest S_i^2 / (out + in), while they fit: the best spent first

`divided` then splits the exact sum into the LoRA factors that clients train, a frozen part beside them, and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from florana.aggregate import validate
from florana.aggregate.best_rank.project import each_target
from florana.errors import InputError
from florana.lora import linalg
from florana.lora.factors import Adapter, Contribution, LoraFactors

NEGLIGIBLE = torch.finfo(torch.float32).eps / 16
"""Components below this share of a module's largest singular value are rounding."""

Choose = Callable[[Mapping[str, linalg.Decomposition]], Mapping[str, int]]
"""Module name -> decomposition of its target, in; module name -> how many components go out, out."""


@dataclass(frozen=True, eq=False)
class Division:
    """An exact sum in three parts; `residual` and `rest` lack the modules in which nothing is left for them.

    Args:
        adapter: the leading singular components, of the clients' rank.
        residual: the following components that go out too, frozen; None where there are none.
        rest: the components that do not go out, or only the first of them; None where there are none.
    """

    adapter: Adapter
    residual: Adapter | None
    rest: Adapter | None


def by_rank(rank: validate.Rank) -> Choose:
    """The same number of components for every module, or each module's own."""
    return lambda wholes: {name: validate.rank_in(rank, name) for name in wholes}


def everything(wholes: Mapping[str, linalg.Decomposition]) -> Mapping[str, int]:
    """Every component of every module."""
    return {name: len(whole.values) for name, whole in wholes.items()}


def by_energy(share: float) -> Choose:
    """The fewest components that hold `share` of each module's squared norm.

    Examples:
        >>> whole = linalg.Decomposition(torch.eye(3), torch.tensor([3.0, 1.0, 0.1]), torch.eye(3))
        >>> by_energy(0.89)({"q": whole}), by_energy(0.95)({"q": whole})
        ({'q': 1}, {'q': 2})
    """
    if not 0 < share <= 1:
        raise InputError(f"the share of energy {share} is not above 0 and at most 1")

    def choose(wholes: Mapping[str, linalg.Decomposition]) -> Mapping[str, int]:
        chosen = {}
        for name, whole in wholes.items():
            squares = whole.values.square()
            # (k,): what is left before each component, summed from the small end
            tail = squares.flip(0).cumsum(0).flip(0)
            chosen[name] = int((tail > (1 - share) * tail[0]).sum()) if len(squares) else 0
        return chosen

    return choose


def by_error(error: float) -> Choose:
    """The fewest components whose relative error per module is at most `error`."""
    if not 0 <= error < 1:
        raise InputError(f"the error {error} is not at least 0 and below 1")
    return by_energy(1 - error * error)


def by_budget(numbers: int, rank: validate.Rank) -> Choose:
    """Components beyond the first `rank` of each module, where they take away most error per parameter sent, while they
    fit.

    Args:
        numbers: parameters that may go out in all, the first `rank` components of every module included.
        rank: the components that go out in any case: one number, or one per module.

    Examples:
        >>> steep = linalg.Decomposition(torch.eye(3), torch.tensor([3.0, 2.0, 0.0]), torch.eye(3))
        >>> flat = linalg.Decomposition(torch.eye(3), torch.tensor([9.0, 1.0, 0.5]), torch.eye(3))
        >>> by_budget(numbers=18, rank=1)({"steep": steep, "flat": flat})  # each component costs 6
        {'steep': 2, 'flat': 1}
    """

    def choose(wholes: Mapping[str, linalg.Decomposition]) -> Mapping[str, int]:
        chosen = {name: validate.rank_in(rank, name) for name in wholes}
        costs = {name: len(whole.left) + whole.right.shape[1] for name, whole in wholes.items()}
        left = numbers - sum(chosen[name] * cost for name, cost in costs.items())
        offers = [
            (-(float(value) ** 2) / costs[name], name, index)
            for name, whole in wholes.items()
            for index, value in enumerate(whole.values)
            if index >= validate.rank_in(rank, name) and value > 0
        ]
        closed: set[str] = set()  # a module whose next component did not fit takes no later one: components go in order
        for _, name, _ in sorted(offers):
            if name in closed:
                continue
            if costs[name] > left:
                closed.add(name)
                continue
            chosen[name] += 1
            left -= costs[name]
        return chosen

    return choose


def divided(
    parts: Sequence[Contribution],
    rank: validate.Rank,
    choose: Choose,
    *,
    added: Adapter | None = None,
    keep: int | None = None,
    trained: Callable[[int, int], int] = lambda rank, outgoing: rank,
) -> Division:
    """The exact weighted sum as LoRA factors of rank `rank`, the frozen components that go out beside it, and the rest.

    Args:
        parts: one contribution per client; what they carried frozen belongs to the sum.
        rank: of the LoRA factors that clients train: one number, or one per module.
        choose: how many singular components of each module go out in all; at least as many do as the factors have.
        added: something more that belongs to the sum (what was kept back before).
        keep: the most components of the rest; None keeps all.
        trained: (a module's `rank`, how many of its components go out) -> how many of them the factors have; all of
            `rank`, padded with zeros where the sum has fewer, where not given.

    Raises:
        InputError: the contributions do not fit together.
    """
    wholes: dict[str, linalg.Decomposition] = {}
    scalings: dict[str, float] = {}
    dtype = next(iter(parts[0].adapter.modules.values())).A.dtype
    for name, (target, scaling, _) in each_target(parts):
        if added is not None and name in added.modules:
            target = linalg.join(target, linalg.stack([added.modules[name]], [1.0]))
        wholes[name], scalings[name] = linalg.decompose(target), scaling
    outgoing = choose(wholes)
    adapters: dict[str, LoraFactors] = {}
    residuals: dict[str, LoraFactors] = {}
    rests: dict[str, LoraFactors] = {}
    for name, whole in wholes.items():
        own = trained(validate.rank_in(rank, name), outgoing[name])
        adapters[name] = linalg.balanced(linalg.kept(whole, own), scalings[name], dtype)
        significant = int((whole.values > NEGLIGIBLE * whole.values[0]).sum())
        end = min(max(own, outgoing[name]), significant)
        last = significant if keep is None else min(end + keep, significant)
        for place, begin, stop in ((residuals, own, end), (rests, max(own, end), last)):
            if begin < stop:
                place[name] = linalg.balanced(linalg.between(whole, begin, stop), 1.0, dtype)
    return Division(
        Adapter(adapters, validate.average_extra(parts)),
        Adapter(residuals) if residuals else None,
        Adapter(rests) if rests else None,
    )
