"""The cells of a study: one run each, named by what makes it differ. Cells of one group share partition and start."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from florana.errors import RecipeError, nearest
from florana.recipe import schema as r
from florana.recipe.load import check, put
from florana.study.named_methods import Method, method_of

CENTRALISED = "centralised"
"""The control that trains one client on all rows: no strategy, but a recipe of its own."""


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
    """One run of a study.

    Args:
        setting: what it has in common with its group.
        method: what makes it differ.
        tuned: dotted keys of the recipe -> what tuning chose for this method in this setting.
    """

    setting: Setting
    method: Method
    tuned: Mapping[str, Any] = field(default_factory=dict)

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
        rounds_on: for how many rounds each rule goes on from its merge there.
        tune: dotted key -> the values tried, see `florana.study.tune`.
        tune_seeds: on how many seeds each is tried.
        comparisons: pairs of methods' labels, the first minus the second: declared before any score.
        tuned: (setting's name, method's label) -> dotted key -> the value chosen; empty before tuning.
    """

    base: r.Recipe
    methods: Sequence[Method]
    settings: Sequence[Setting]
    fixed_updates_rounds: Sequence[int] = field(default_factory=tuple)
    rounds_on: int = 0
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune_seeds: int = 1
    comparisons: Sequence[tuple[str, str]] = field(default_factory=tuple)
    tuned: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """Every run, group by group."""
        return [
            Cell(setting, method, self.tuned.get((setting.name, method.label), {}))
            for setting in self.settings
            for method in self.methods
        ]


def plan_of(
    recipe: r.Recipe,
    *,
    methods: Sequence[str] = (),
    seeds: int | None = None,
    alphas: Sequence[float] = (),
    ranks: Sequence[int] = (),
    tune: Mapping[str, Sequence[Any]] | None = None,
) -> Plan:
    """The study of a recipe: its `[study]` section, what is given here coming first; every cell's recipe is checked.

    FedIT is always among the methods: differences are taken from it. A method in a file passes the contract first.

    Args:
        recipe: the recipe that is varied.
        methods: names with options in brackets, or `file.py:rule`.
        seeds: how many; the recipe's seed is the first.
        alphas: Dirichlet's parameters.
        ranks: LoRA ranks; alpha / rank is kept.
        tune: dotted key -> the values to try for each method.

    Raises:
        RecipeError: no methods, an unknown one, one that breaks the contract, or a combination that cannot hold.
    """
    study = recipe.study or r.Study()
    wanted = list(methods) or list(study.methods) or ["fedit", "flora-na", "best-rank"]
    controls = [name for name in study.controls if name not in wanted]
    names = list(dict.fromkeys([*(["fedit"] if "fedit" not in wanted else []), *wanted, *controls]))
    found = [method_of(name) for name in names]
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
    wanted_tuning = tune or study.tune
    if wanted_tuning and not recipe.data.validated:
        raise RecipeError(
            "tuning chooses by rows that are neither trained on nor scored, and the recipe has none",
            fix="give data.validation_share = 0.1, or a file as data.validation",
        )
    plan = Plan(
        recipe.model_copy(update={"study": None}),
        found,
        settings,
        swap,
        study.fixed_updates_rounds_on,
        wanted_tuning,
        study.tune_seeds,
        _declared(study.comparisons, found),
    )
    for cell in plan.cells:
        recipe_of(plan.base, cell)
    return plan


def _declared(pairs: Sequence[Sequence[str]], methods: Sequence[Method]) -> list[tuple[str, str]]:
    """The declared pairs by the methods' labels; of none, each method but the controls minus FedIT."""
    labels = [method.label for method in methods]
    if not pairs:
        own = [m.label for m in methods if m.strategy["name"] not in (CENTRALISED, "local-only", "oracle", "fedit")
               or m.settings]  # fmt: skip
        return [(label, "fedit") for label in own]
    declared = [(method_of(first).label, method_of(second).label) for first, second in pairs]
    for label in (name for pair in declared for name in pair):
        if label not in labels:
            raise RecipeError(f"study.comparisons names '{label}', which is none of the methods",
                              fix=nearest(label, labels))  # fmt: skip
    return declared


def recipe_of(base: r.Recipe, cell: Cell) -> r.Recipe:
    """The recipe of one run. Raises RecipeError where method and setting do not go together."""
    table = base.model_dump(exclude_none=True)
    for key, value in {**cell.method.settings, **cell.tuned}.items():
        put(table, key, value)
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
