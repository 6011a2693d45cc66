"""A researcher's own method: one function in her own Python file, named on the command line as FILE.py:FUNCTION.

    def my_rule(parts: Sequence[Contribution], rank: int) -> Adapter

It gets the weighted contributions and the clients' rank, and gives the adapter that goes back. Both factors are trained
and sent, as in FedIT; everything else (sampling, the gate, the journal, the report) is florana's.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution
from florana.strategy import facts
from florana.strategy.base import Outcome, State, Strategy, advance, broadcast, rank_of, start

Rule = Callable[[Sequence[Contribution], int], Adapter]

FACTS = facts.Facts(
    does="a method of one's own",
    trains="A, B",
    up=facts.PAIR,
    down=facts.PAIR,
    exact="not declared",
    mixed_ranks="refused: not declared",
    coordinates="move",  # nobody knows
    optimizer=("products",),
)


def is_own(name: str) -> bool:
    """Whether a strategy's name means a function in a file.

    Examples:
        >>> is_own("mine.py:rule"), is_own("fedit")
        (True, False)
    """
    return ".py:" in name


def plain_name(name: str) -> str:
    """A strategy's name as people read it: of a function in a file the function's.

    Examples:
        >>> plain_name("/home/ada/mine.py:rule"), plain_name("fedit")
        ('rule', 'fedit')
    """
    return name.rpartition(":")[2] if is_own(name) else name


def load_rule(name: str) -> Rule:
    """The function behind FILE.py:FUNCTION. The file is executed: it is the user's own.

    Raises:
        RecipeError: no such file or function, or the file fails when it is executed.
    """
    path_text, _, function = name.rpartition(":")
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise RecipeError(f"there is no file {path}", fix="name a method as FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"florana_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling by name look a module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"{path} fails when it is executed", why=f"{type(error).__name__}: {error}") from None
    rule = getattr(module, function, None)
    if not callable(rule):
        known = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")))
        raise RecipeError(f"{path} has no function '{function}'", fix=f"it has: {known or 'none'}")
    return rule  # type: ignore[no-any-return]


def build_own(name: str) -> Strategy:
    """The strategy around the function behind FILE.py:FUNCTION. Raises RecipeError as `load_rule`."""
    rule = load_rule(name)

    def step(state: State, parts: Sequence[Contribution]) -> Outcome:
        return Outcome(advance(state, rule(parts, rank_of(state.adapter))))

    return Strategy(plain_name(name), f"{Path(name.rpartition(':')[0]).name}", FACTS, start, broadcast, step)
