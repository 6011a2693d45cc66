"""A round with hostile clients, without models: how far the global model moves, in steps of it without them.

Honest clients move alike by half: one direction is common, one is their own, of the same length, and no entry moves
further than eight steps of AdamW at 5e-3 can. The hostile know what they were sent, what they would honestly have
answered, and each other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from florana.aggregate.cores import folded
from florana.aggregate.stack import combined
from florana.federation import trip_memory
from florana.federation.loop import run_rounds
from florana.federation.messages import Brief, Failure, Reply, pack, unpack
from florana.federation.step_bounds import reach_of
from florana.federation.terms import Federation
from florana.federation.weighting import Weighing, by_examples
from florana.lora.factors import kind_of
from florana.recipe.robust_schema import Robust
from florana.strategy.base import State, Strategy
from tests.federation import CARD, built, first_adapter

STEP = 0.02
"""How far an honest client moves an entry, root mean square."""
LIMIT = reach_of(5e-3, 0.0, 8)
CLEAN = 2
"""Honest rounds before the attack."""

Attack = Callable[[str, Tensor, Tensor, int], Tensor]
"""(tensor's name, what was sent, what an honest client answers, its number among the hostile) -> what is answered."""


def times(factor: float) -> Attack:
    return lambda name, before, after, index: before + factor * (after - before)


def target(size: float) -> Attack:
    """Towards one model that the hostile have agreed on."""
    return lambda name, before, after, index: before + size * _drawn(before.shape, f"target {name}")


def edge(name: str, before: Tensor, after: Tensor, index: int) -> Tensor:
    """As far as the reach allows, in one direction of rank one."""
    far = LIMIT.of(name, before, {"core", "scale"} if kind_of(name) == "core" else set()) * 0.999
    return (before.double() + far * torch.sign(_drawn(before.shape, "edge")).double()).float()


def gauge(factor: float) -> Attack:
    """The honest product, written as (t B, A / t)."""
    return lambda name, before, after, index: after * {"B": factor, "A": 1 / factor}.get(kind_of(name), 1.0)


ATTACKS: Mapping[str, Attack] = {
    **{f"x{factor:g}": times(factor) for factor in (2, 5, 9, 30, 500, 1e4, 1e6)},
    **{f"x{factor:g}": times(factor) for factor in (-1, -10, -500)},
    **{f"target, {size / STEP:g} steps": target(size) for size in (STEP, 5 * STEP, 100 * STEP)},
    "as far as the reach": edge,
    **{f"(tB, A/t), t = {t:g}": gauge(t) for t in (2, 10, 1000)},
}
ROWS: Mapping[str, int] = {"rows x 10^7": 10**9}


def rule_of(name: str, hostile: int) -> Robust:
    needs = name in ("multi-krum", "trimmed")
    return Robust.model_validate({"rule": name} | ({"hostile": max(1, hostile)} if needs else {}))


def _drawn(shape: Sequence[int], what: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(what)) % 2**31)
    return torch.randn(tuple(shape), generator=generator)


def honest(name: str, before: Tensor, client: str, round_: int) -> Tensor:
    common, own = _drawn(before.shape, f"{name} {round_}"), _drawn(before.shape, f"{name} {round_} {client}")
    change = STEP * (common + own) / math.sqrt(2)
    far = LIMIT.moves * 0.99
    return before + change.clamp(-far, far)


class Clients:
    """The engine: honest clients, and the last `hostile` of them otherwise in the rounds after CLEAN."""

    def __init__(
        self, strategy: Strategy, names: Sequence[str], hostile: int, attack: Attack | None, rows: int
    ) -> None:
        self.first, self.attack, self.rows = strategy.init(first_adapter()).adapter, attack, rows
        self.sums, self.kept = strategy.sums, dict[str, dict[str, Tensor]]()
        self.hostile = list(names)[len(names) - hostile :]
        self.absent = attack is None

    def fit(self, briefs: Sequence[Brief]) -> Iterator[Reply | Failure]:
        for brief in briefs:
            if brief.trip:  # it has trained, or lied
                content = trip_memory.measured(brief, self.sums, self.kept[brief.client]).content
                yield Reply(brief.client, brief.round, self.rows_of(brief), {}, content, 0.0)
                continue
            begun, _ = unpack(brief.payload, self.first, {}, brief.scalings)
            before = load(pack(begun, brief.returns, blocks=brief.blocks))
            tensors = {n: honest(n, t, brief.client, brief.round) for n, t in before.items()}
            if brief.client in self.hostile:
                if brief.round > CLEAN and self.absent:
                    yield Failure(brief.client, "away")
                    continue
                if brief.round > CLEAN and self.attack is not None:
                    index = self.hostile.index(brief.client)
                    tensors = {n: self.attack(n, before[n], t, index).float() for n, t in tensors.items()}
            content = save({n: t.contiguous() for n, t in tensors.items()})
            if brief.trip is not None:
                trained, _ = unpack(content, begun, {}, brief.scalings)
                self.kept[brief.client] = trip_memory.update_of(begun, trained)
                content = trip_memory.measured(brief, self.sums, self.kept[brief.client]).content
            yield Reply(brief.client, brief.round, self.rows_of(brief), {}, content, 0.0)

    def rows_of(self, brief: Brief) -> int:
        """What it claims to have trained on."""
        claims = self.rows if brief.client in self.hostile else 0
        return claims or 50 + 5 * int(brief.client[1:])

    def memories(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {}

    def remember(self, client: str, memory: Mapping[str, Tensor]) -> None:
        pass


class NoJournal:
    """Commits nothing."""

    def __init__(self, folder: str) -> None:
        self.folder, self.card = Path(folder), CARD

    def commit(self, *args: object) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Setting:
    strategy: str
    clients: int
    hostile: int
    rule: str = "none"
    reach: bool = True


def after(setting: Setting, state: State | None, rounds: int, attack: Attack | None, rows: int = 0) -> State:
    strategy = built(setting.strategy)
    names = [f"c{u:02d}" for u in range(setting.clients)]
    robust = rule_of(setting.rule, setting.hostile)
    federation = Federation(
        clients=names,
        rounds=rounds,
        per_round=len(names),
        seed=1,
        weighing=Weighing(by_examples, None, robust.build(), robust.rule),
        evaluate=None,
        measured=lambda round_: False,
        personal=lambda round_: False,
        reach=(lambda rows: LIMIT) if setting.reach else None,
    )
    engine = Clients(strategy, names, setting.hostile, attack, rows)
    begun = strategy.init(first_adapter()) if state is None else state
    with tempfile.TemporaryDirectory() as folder:
        journal: typing.Any = NoJournal(folder)
        return run_rounds(strategy, begun, engine, federation, journal, lambda event: None)


def flat(state: State) -> dict[str, Tensor]:
    """The global products (A, where a method has no product) and the heads, each as one vector."""
    whole = combined(folded(state.adapter), state.residual)
    products = torch.cat([(p.scaling * p.B.double() @ p.A.double()).flatten() for p in whole.modules.values()])
    if not bool(products.any()):
        products = torch.cat([p.A.double().flatten() for p in whole.modules.values()])
    return {"product": products, "head": torch.cat([t.double().flatten() for t in whole.extra.values()])}


@functools.lru_cache(maxsize=8)
def _without(setting: Setting, rows: int) -> tuple[State, State]:
    """The state before the attack, and after the round without the hostile."""
    before = after(setting, None, CLEAN, times(1.0), rows)
    return before, after(setting, before, CLEAN + 1, None, rows)


def require_clean(setting: Setting, rows: int = 0) -> None:
    """Raises FederationError where the rounds fail without any attack: nothing would be examined."""
    _without(dataclasses.replace(setting, rule="none"), rows)


def movement(setting: Setting, attack: Attack, rows: int = 0) -> float:
    """||attacked - before|| / ||clean - before||: the larger of the products' and the heads'."""
    before, clean = _without(dataclasses.replace(setting, rule="none"), rows)
    start, good, bad = flat(before), flat(clean), flat(after(setting, before, CLEAN + 1, attack, rows))
    return max(float((bad[n] - start[n]).norm() / (good[n] - start[n]).norm()) for n in start)
