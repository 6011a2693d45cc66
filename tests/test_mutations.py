"""The mutation script's table keeps step with the source: each mutation has its place, and a test file."""

from __future__ import annotations

import runpy

from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "mutate.py"))


def test_every_mutation_has_its_place_and_its_tests() -> None:
    lost = []
    for file, symbol, old, new, tests in SCRIPT["MUTATIONS"]:
        assert old != new
        if SCRIPT["mutated"]((ROOT / "src" / "florana" / file).read_text(), symbol, old, new) is None:
            lost.append(f"{file} {symbol}: {old}")
        lost += [path for path in SCRIPT["paths"](tests) if not (ROOT / path).exists()]
    assert lost == []


def test_a_mutation_changes_its_own_function_alone() -> None:
    text = "def f():\n    return a + b\n\n\nclass C:\n    def f(self):\n        return a + b\n"
    assert SCRIPT["mutated"](text, "C.f", "a + b", "a - b") == text[::-1].replace("b + a", "b - a", 1)[::-1]
    assert SCRIPT["mutated"](text, "f", "a + b", "a - b") == text.replace("a + b", "a - b", 1)
    assert SCRIPT["mutated"](text, "g", "a + b", "a - b") is None
