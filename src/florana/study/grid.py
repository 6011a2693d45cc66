"""The cells of a study: one run each, named by what makes it differ. Cells of one group share partition and start."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florana.bounded import toml
from florana.errors import RecipeError
from florana.recipe import schema as r
from florana.recipe.load import check
from florana.recipe.renamed import current
from florana.strategy.conformance import check_rule
from florana.strategy.custom import is_own, load_rule

CENTRALISED = "centralised"
"""The control that trains one client on all rows: no strategy, but a recipe of its own."""


@dataclass(frozen=True)
class Method:
    """A method as a study calls it: the label of its rows, and the recipe's strategy table."""

    label: str
    strategy: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What the cells of a group have in common besides the recipe. None: as the recipe has it.

    Args:
        seed: of partition, start and training.
        alpha: Dirichlet's parameter of the partition.
        rank: r of the LoRA factors.
    """

    seed: int
    alpha: float | None = None
    rank: int | None = None

    @property
    def name(self) -> str:
        """As folders and tables call it, the seed left out."""
        alpha = f"alpha-{self.alpha:g}" if self.alpha is not None else ""
        rank = f"rank-{self.rank}" if self.rank is not None else ""
        return "-".join(part for part in (alpha, rank) if part) or "as-recipe"


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    setting: Setting
    method: Method

    @property
    def id(self) -> str:
        """A folder name."""
        return f"{self.setting.name}/seed-{self.setting.seed}/{re.sub(r'[^A-Za-z0-9.=-]+', '_', self.method.label)}"


@dataclass(frozen=True)
class Plan:
    """A whole study.

    Args:
        base: the recipe that is varied.
        methods: the methods, controls included.
        settings: the settings, each a seed, an alpha and a rank.
        fixed_updates_rounds: the rounds of the fixed-updates ablation.
    """

    base: r.Recipe
    methods: Sequence[Method]
    settings: Sequence[Setting]
    fixed_updates_rounds: Sequence[int] = field(default_factory=tuple)

    @property
    def cells(self) -> list[Cell]:
        """Every run, group by group."""
        return [Cell(setting, method) for setting in self.settings for method in self.methods]


def plan_of(
    recipe: r.Recipe,
    *,
    methods: Sequence[str] = (),
    seeds: int | None = None,
    alphas: Sequence[float] = (),
    ranks: Sequence[int] = (),
) -> Plan:
    """The study of a recipe: its `[study]` section, what is given here coming first; every cell's recipe is checked.

    FedIT is always among the methods: differences are taken from it. A method in a file passes the contract first.

    Args:
        recipe: the recipe that is varied.
        methods: names with options in brackets, or `file.py:rule`.
        seeds: how many; the recipe's seed is the first.
        alphas: Dirichlet's parameters.
        ranks: LoRA ranks; alpha / rank is kept.

    Raises:
        RecipeError: no methods, an unknown one, one that breaks the contract, or a combination that cannot hold.
    """
    study = recipe.study or r.Study()
    wanted = list(methods) or list(study.methods) or ["fedit", "flora-na", "best-rank"]
    controls = [name for name in study.controls if name not in wanted]
    names = list(dict.fromkeys([*(["fedit"] if "fedit" not in wanted else []), *wanted, *controls]))
    parsed = [method_of(name) for name in names]
    for method in parsed:
        own = str(method.strategy["name"])
        if is_own(own):
            check_rule(load_rule(own), method.label)
    every_alpha: list[float | None] = [*(alphas or study.alphas)] or [None]
    every_rank: list[int | None] = [*(ranks or study.ranks)] or [None]
    settings = [
        Setting(recipe.seed + seed, alpha, rank)
        for alpha in every_alpha
        for rank in every_rank
        for seed in range(seeds or study.seeds)
    ]
    last = recipe.federation.rounds
    swap = study.fixed_updates_rounds or sorted({1, last})
    if max(swap) > last:
        raise RecipeError(f"study.fixed_updates_rounds has {max(swap)}, but there are {last} rounds")
    plan = Plan(recipe.model_copy(update={"study": None}), parsed, settings, swap)
    for cell in plan.cells:
        recipe_of(plan.base, cell)
    return plan


def method_of(text: str) -> Method:
    """A method by name, with options in brackets.

    Examples:
        >>> method_of("best-rank[carry_rank=8, factorization=aligned]").strategy["carry_rank"]
        8
    """
    found = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[(.*)\])?\s*", text)
    if found is None:
        raise RecipeError(f"{text!r} is no method", fix="for example best-rank, or best-rank[carry_rank=8]")
    name, inner = found[1], found[2] or ""
    options: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in inner.split(","))):
        key, equals, value = (word.strip() for word in pair.partition("="))
        if not equals:
            raise RecipeError(f"the option {pair!r} of '{name}' is not key=value")
        try:
            options[key] = toml(f"value = {value}")["value"]
        except ValueError:
            options[key] = value  # a bare word is a string
    if is_own(name):
        path, _, function = name.rpartition(":")
        return Method(function, {"name": f"{Path(path).expanduser().resolve()}:{function}"})
    options = current("strategy", options)
    label = name + (f"[{', '.join(f'{k}={v}' for k, v in options.items())}]" if options else "")
    return Method(label, {"name": name, **options})


def split_methods(text: str) -> list[str]:
    """The methods of a comma-separated list; commas in brackets belong to a method.

    Examples:
        >>> split_methods("fedit, best-rank[carry_rank=8,factorization=aligned]")
        ['fedit', 'best-rank[carry_rank=8,factorization=aligned]']
    """
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def recipe_of(base: r.Recipe, cell: Cell) -> r.Recipe:
    """The recipe of one run. Raises RecipeError where method and setting do not go together."""
    table = base.model_dump(exclude_none=True)
    table["seed"] = cell.setting.seed
    if cell.setting.alpha is not None:
        table["partition"] |= {"kind": "dirichlet", "alpha": cell.setting.alpha}
    if cell.setting.rank is not None and base.model.rank_pattern:
        raise RecipeError(
            "ranks are compared, but model.rank_pattern gives some modules ranks of their own",
            fix="leave out one of them",
        )
    if cell.setting.rank is not None:
        scale = base.model.alpha / base.model.rank
        table["model"] |= {"rank": cell.setting.rank, "alpha": scale * cell.setting.rank}
    table["strategy"] = dict(cell.method.strategy)
    if cell.method.strategy["name"] == CENTRALISED:
        table["strategy"] = {"name": "fedit"}
        _pool(table, base)
    if cell.method.strategy["name"] == "local-only" and base.task != "causal-lm":
        table["model"]["head"] = "personal"
    if cell.method.strategy["name"] == "local-only" and base.model.variant == "dora":
        table["model"]["magnitude"] = "personal"
    return check(table, f"the study's cell {cell.id}")


def _pool(table: dict[str, Any], base: r.Recipe) -> None:
    """One client that holds every row, and takes as many optimizer steps a round as all clients of a round together."""
    reached = base.federation.clients_per_round or base.partition.clients
    if base.train.steps is not None and reached is None:
        raise RecipeError(
            "the control 'centralised' needs to know how many clients a round has",
            fix="give federation.clients_per_round, or leave the control out (study.controls)",
        )
    table["partition"] = {"kind": "iid", "clients": 1, "holdout": base.partition.holdout}
    table["federation"] |= {"min_clients": 1, "uplink": "float32"}  # nothing is sent
    table["federation"].pop("clients_per_round", None)
    table["model"] |= {"head": "average", "magnitude": "average"}
    table["model"].pop("client_ranks", None)
    if base.train.steps is not None and reached is not None:
        table["train"]["steps"] = base.train.steps * reached
