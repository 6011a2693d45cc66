"""The mutation script's table keeps step with the source: each mutation has its place, and a test file."""

from __future__ import annotations

import runpy

from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "mutate.py"))


def test_every_mutation_has_its_place_and_its_tests() -> None:
    lost = []
    for file, old, new, tests in SCRIPT["MUTATIONS"]:
        assert old != new
        if old not in (ROOT / "src" / "florana" / file).read_text():
            lost.append(f"{file}: {old}")
        lost += [path for path in SCRIPT["paths"](tests) if not (ROOT / path).exists()]
    assert lost == []
