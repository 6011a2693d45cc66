"""docs/first-study.md: what it names is there, and the script that prints its tables says what the runs say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from florana.recipe.load import check
from florana.report.views import view
from florana.study.grid import Cell, plan_of
from florana.study.named_methods import method_of
from florana.study.publish import publish
from florana.study.runner import execute_study, folder_of
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("findings", ROOT / "benchmarks" / "findings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_study_names_exists() -> None:
    page = (ROOT / "docs" / "first-study.md").read_text()
    named = set(re.findall(r"(?:recipes|benchmarks)/[\w/-]+\.(?:toml|py)", page))
    assert {"recipes/study-findings.toml", "benchmarks/distance.py", "benchmarks/findings.py"} <= named
    assert all((ROOT / path).exists() for path in named), named


def test_the_tables_are_those_of_the_runs(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["federation"] = {"rounds": 2}
    recipe_table["evaluate"] = {"personal": "last", "every": 1}
    recipe_table["study"] = {"controls": ["oracle"], "methods": ["fedit", "best-rank"], "fixed_updates_rounds": [1]}
    recipe_table["study"]["fixed_updates_rounds_on"] = 1
    plan, out = plan_of(check(recipe_table, "t"), seeds=2), tmp_path / "study"
    publish(plan, out, execute_study(plan, out, 1, lambda count, name: None))
    script = str(ROOT / "benchmarks" / "findings.py")
    kept = tmp_path / "kept.json"
    done = subprocess.run([sys.executable, script, str(out), "--out", str(kept)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = subprocess.run([sys.executable, script, str(kept)], capture_output=True, text=True)
    assert again.stdout == done.stdout, "what is kept is enough for the tables"
    lines = [re.split(r" *\| *", line)[1:-1] for line in done.stdout.splitlines() if line.startswith("| `best-rank`")]
    swapped, local, bytes_, server = lines[0], lines[-3], lines[-2], lines[-1]
    cells = [Cell(setting, method_of("best-rank")) for setting in plan.settings]
    runs = [view(folder_of(out, cell)) for cell in cells]
    assert local[1].startswith(f"{np.mean([run.final('global') for run in runs]):.3f} (")
    assert float(bytes_[3]) == pytest.approx(
        np.mean([sum(r.bytes_up for r in run.records) for run in runs]) / 1e6, abs=0.05
    )
    gains = [1000 * (run.final("global") - run.start) / (run.bytes_so_far[2] / 1e6) for run in runs]  # type: ignore[operator]
    assert float(bytes_[5].split()[0]) == pytest.approx(np.mean(gains), abs=0.006)
    seconds = [np.median([1e3 * r.server_seconds for r in run.records]) for run in runs]
    assert float(server[1].split()[0]) == pytest.approx(np.mean(seconds), abs=0.06)
    assert len(swapped) == 3


def test_the_bootstrap_resamples_whole_seeds(findings: ModuleType) -> None:
    values = [-0.9, -0.4, 0.1, 0.3, 0.8]
    low, high = findings.bootstrap(values)
    rng = np.random.default_rng(7)
    means = [np.mean(rng.choice(values, 5)) for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.05)
    assert findings.bootstrap(values) == (low, high), "the same draws every time"
    assert findings.bootstrap([0.4, 0.4]) == pytest.approx((0.4, 0.4))
