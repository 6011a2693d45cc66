"""The rules that `florana merge` knows, by the names of its option: one module of all adapters in, its merged factors
out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from florana.aggregate.best_rank.project import best_rank, by_gram
from florana.aggregate.flora_na import component
from florana.aggregate.flora_na.scalars import mix
from florana.aggregate.heterogeneous import all_padded
from florana.aggregate.mean import mean
from florana.aggregate.stack import stack
from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution

Rule = Callable[[Sequence[Contribution], int], Adapter]


def _of_one_rank(parts: Sequence[Contribution]) -> list[Contribution]:
    """Each module padded with zeros to the largest rank that it has, as in a federation: the same products."""
    names = parts[0].adapter.modules
    return all_padded(parts, {name: max(part.adapter.modules[name].rank for part in parts) for name in names})


RULES: dict[str, Rule] = {
    "best-rank": lambda parts, rank: best_rank(parts, rank, way=by_gram),
    "stack": lambda parts, rank: stack(parts),
    "flora-na": lambda parts, rank: mix(_of_one_rank(parts)).adapter,
    "fedit": lambda parts, rank: mean(parts),
}
"""Name -> the rule, of the contributions and the wanted rank (which only `best-rank` is free to choose)."""

SCOPES: dict[str, Rule] = {
    "module": RULES["flora-na"],
    "component": lambda parts, rank: mix(_of_one_rank(parts), solver=component.solve).adapter,
}
"""How far one of flora-na's coefficients reaches: a client's factor in a module, or one of its rank components."""


def rule_of(method: str, scope: str | None) -> Rule:
    """The rule of a method that is known, in that scope. Raises RecipeError where the method has no such scope."""
    if scope is None:
        return RULES[method]
    if method != "flora-na":
        raise RecipeError(f"--scope has no meaning for '{method}'", fix="leave it out, or use --method flora-na")
    if scope not in SCOPES:
        raise RecipeError(
            f"there is no scope '{scope}' of a merge",
            why="modules are merged one by one, so no coefficient is shared by several of them",
            fix=f"one of {', '.join(SCOPES)}",
        )
    return SCOPES[scope]
