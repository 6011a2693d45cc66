"""The mutation script's table keeps step with the source: each mutation has its place, and a test file."""

from __future__ import annotations

import runpy

from tests.conftest import ROOT

MUTATIONS = runpy.run_path(str(ROOT / "scripts" / "mutate.py"))["MUTATIONS"]


def test_every_mutation_has_its_place_and_its_tests() -> None:
    lost = []
    for file, old, new, tests in MUTATIONS:
        assert old != new
        if old not in (ROOT / "src" / "florana" / file).read_text():
            lost.append(f"{file}: {old}")
        if not (ROOT / "tests" / f"{tests}.py").exists():
            lost.append(tests)
    assert lost == []
