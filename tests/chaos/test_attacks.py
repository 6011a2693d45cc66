"""Hostile clients under every strategy and rule: how far the global model moves, and what a backdoor leaves behind.

Some of it in every test run, all by `make chaos`; docs/reliability.md has the tables (`benchmarks/attacks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from florana.errors import FederationError
from florana.strategy import STRATEGIES
from tests.attacks import ATTACKS, Attack, Setting, movement, require_clean, times
from tests.attacks_on_text import accuracy
from tests.chaos.counts import Tally
from tests.federation import built

RULES = ("none", "clip", "multi-krum", "geometric-median", "trimmed")
CROWDS = ((10, 1), (10, 2), (10, 4), (3, 1))
CLAIM = 10**9
ATTACKED = [*STRATEGIES, "best-rank from sums"]
WITH_ROWS: dict[str, tuple[Attack, int]] = {
    **{name: (attack, 0) for name, attack in ATTACKS.items()},
    "x5 and 10^9 rows": (times(5), CLAIM),
    "x-5 and 10^9 rows": (times(-5), CLAIM),
}
SOME = ("x500", "x9", "x-10", "(tB, A/t), t = 10", "x5 and 10^9 rows")


def offered(strategy: str, rule: str, clients: int, hostile: int) -> bool:
    """Whether a recipe would be let through: the strategy sees updates, and the honest are enough for the rule."""
    if rule != "none" and built(strategy).facts.robust.startswith("no"):
        return False
    return clients >= {"multi-krum": 2 * hostile + 3, "trimmed": 2 * hostile + 1}.get(rule, 1)


def limit(rule: str, clients: int, hostile: int) -> float | None:
    """The goal, in clean steps; None where nothing is promised."""
    if rule != "none":
        return 2.0 if hostile <= 0.2 * clients else None
    return 10.0 if (clients, hostile) == (10, 1) else None


def worst(setting: Setting, names: Sequence[str]) -> tuple[float, str, int]:
    """The largest movement, by which attack, and of how many tries; a round that ends the run moves nothing."""
    found = []
    require_clean(setting)
    for name in names:
        attack, rows = WITH_ROWS[name]
        try:
            found.append((movement(setting, attack, rows), name))
        except FederationError:
            found.append((0.0, name))
    return (*max(found), len(found))


@pytest.mark.parametrize("strategy", ATTACKED)
def test_one_of_ten_moves_the_model_little_without_a_rule(strategy: str) -> None:
    """The bounds of the gate alone, without knowing how clients train."""
    moved, attack, _ = worst(Setting(strategy, 10, 1, "none", reach=False), SOME)
    assert moved <= 10, attack


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("strategy", ["fedit", "best-rank", "fed-sb"])
def test_a_fifth_of_colluders_moves_it_less_under_a_rule(strategy: str, rule: str) -> None:
    moved, attack, _ = worst(Setting(strategy, 10, 2, rule, reach=False), SOME[1:])
    assert moved <= 2, attack


@pytest.mark.chaos
@pytest.mark.parametrize("reach", [True, False], ids=["reach known", "reach unknown"])
@pytest.mark.parametrize("strategy", ATTACKED)
def test_every_attack_under_every_rule(strategy: str, reach: bool, tally: Tally) -> None:
    torch.set_num_threads(1)
    tried, figures, wrong = 0, [], []
    for clients, hostile in CROWDS:
        for rule in RULES:
            if not offered(strategy, rule, clients, hostile):
                continue
            moved, attack, count = worst(Setting(strategy, clients, hostile, rule, reach), [*WITH_ROWS])
            tried += count
            figures.append(f"{hostile}/{clients} {rule} {moved:.2f}")
            most = limit(rule, clients, hostile)
            if most is not None and moved > most:
                wrong.append(f"{figures[-1]} ({attack})")
    assert not wrong
    tally(f"attacks, {strategy}, {'with' if reach else 'without'} the reach", tried, "; ".join(figures))


@pytest.mark.chaos
@pytest.mark.parametrize("rule", ["none", *RULES[1:]])
def test_turned_labels_on_real_text(rule: str, tmp_path: Path, tally: Tally) -> None:
    """Two of ten with every label turned and their update times five, beside a run of the eight others."""
    torch.set_num_threads(1)
    clean = accuracy("none", 2, 0.0, tmp_path / "clean")
    hit = accuracy(rule, 2, 5.0, tmp_path / "hit")
    if rule == "none":
        assert hit <= clean - 0.1, "the attack does nothing"
    else:
        assert hit >= clean - (0.06 if rule == "multi-krum" else 0.02)  # which leaves honest clients out: docs
    tally(f"turned labels x5, 2 of 10, {rule}", 1, f"accuracy {hit:.3f}, without the two {clean:.3f}")
