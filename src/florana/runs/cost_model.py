"""`florana plan`: what a federation of a model would send and hold, for every method, before anything is loaded.

Numbers are exact counts from the module shapes and the methods' own declarations; bytes are four per parameter
(float32), without the messages' headers (about a hundred bytes per tensor); a recipe's `federation.uplink` may
make them fewer. Heads that are trained whole are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from florana.errors import RecipeError
from florana.recipe.strategy_options import check_strategy
from florana.strategy import STRATEGIES, built
from florana.strategy.base import Strategy
from florana.strategy.facts import Size

FLOAT = 4
ADAM = 4
"""Copies of a trained number at the client: itself, its gradient, two moments."""
FULL = "full fine-tuning"


@dataclass(frozen=True)
class Line:
    """One method.

    Args:
        method: the method's name.
        up: parameters that each client sends in round 2, the first with a frozen part.
        down: parameters that each client is sent in round 2.
        down_late: the parameters that a broadcast can grow to.
        client: bytes at a client besides activations.
        server: bytes of the clients' factors of one round and the state.
        against_fedit: all parameters up and down of a late round, as a ratio to FedIT's.
    """

    method: str
    up: int
    down: int
    down_late: int
    client: int
    server: int
    against_fedit: float


@dataclass(frozen=True)
class ModelPlan:
    """The plan of a model: its size, the modules that are adapted, and a line per method."""

    model: str
    parameters: int
    modules: int
    rank: int
    clients: int
    base_bytes: int
    lines: Sequence[Line]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON's own types."""
        return asdict(self)


def plan_model(
    model: str,
    shapes: Mapping[str, tuple[int, int]],
    parameters: int,
    *,
    rank: int,
    clients: int,
    methods: Mapping[str, Mapping[str, Any]] = {},
    base_bits: int = 16,
) -> ModelPlan:
    """Count for every method, full fine-tuning as the last line.

    Args:
        model: the model's name.
        shapes: adapted module -> (out, in).
        parameters: how many parameters the base model has.
        rank: r of the LoRA factors.
        clients: clients per round.
        methods: label -> a recipe's [strategy]: its name, and options beside it; every method where empty.
        base_bits: bits per parameter of the frozen base.

    Raises:
        RecipeError: an unknown method or option, a rank above a module's sides, or senseless numbers.
    """
    strategies = {label: _built(label, table) for label, table in methods.items()}
    strategies = strategies or {name: build() for name, build in STRATEGIES.items()}
    if rank < 1 or clients < 1:
        raise RecipeError(f"--rank {rank} and --clients {clients} must be at least 1")
    narrow = min((min(shape), name) for name, shape in shapes.items())
    if rank > narrow[0]:
        raise RecipeError(f"--rank {rank} is above the smaller side of module '{narrow[1]}', {narrow[0]}")
    for label in methods:
        if (own := strategies[label].facts.shape(rank)[0]) > narrow[0]:
            raise RecipeError(f"{label}: its rank {own} is above the smaller side of module '{narrow[1]}', {narrow[0]}")
    base = parameters * base_bits // 8
    fedit = 2 * sum(rank * (out + into) for out, into in shapes.values())
    lines = [_line(label, one, shapes, rank, clients, base, fedit) for label, one in strategies.items()]
    full = Line(FULL, parameters, parameters, parameters, ADAM * FLOAT * parameters, (clients + 1) * FLOAT * parameters,
                2 * parameters / fedit)  # fmt: skip
    return ModelPlan(model, parameters, len(shapes), rank, clients, base, [*lines, full])


def _built(label: str, table: Mapping[str, Any]) -> Strategy:
    check_strategy(table, f"--methods {label}")
    return built(table)


def _line(
    name: str,
    strategy: Strategy,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    clients: int,
    base: int,
    fedit: int,
) -> Line:
    facts = strategy.facts
    up = down = late = trained = held = 0
    for out, into in shapes.values():
        own, blocks = facts.shape(rank)
        first, most = (
            Size(out, into, own, 1, min(facts.residual(clients, rank, rounds), min(out, into)), blocks)
            for rounds in (1, 10**6)
        )
        up += facts.up.of(first)
        down += facts.down.of(first)
        late += facts.down.of(most)
        held += own * (out + into) + most.residual * (out + into)
        trained += facts.trained(first)
    client = base + FLOAT * (held + (ADAM - 1) * trained)
    server = FLOAT * (held + clients * up)
    return Line(name, up, down, late, client, server, (up + late) / fedit)
