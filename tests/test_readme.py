"""What the documentation shows is run: the README's example, its recipes' commands, and every docstring example."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
HEAVY = {"florana.track.mlflow": "mlflow", "florana.track.wandb": "wandb"}
"""Modules around a library that no development environment has; they hold no examples."""
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "src").rglob("*.py")
    if path.name != "__main__.py"
)


def example() -> str:
    found = re.search(r"<!-- tested -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_readmes_example_runs_and_prints_ordered_errors(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", example()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = [float(number) for number in re.findall(r"error (\d\.\d+)", done.stdout)]
    assert len(errors) == 3
    assert errors[0] >= errors[1] >= errors[2]
    assert (tmp_path / "merged" / "adapter_model.safetensors").exists()
    assert len([line for line in example().splitlines() if line.strip()]) <= 20


def test_the_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"recipes/[\w-]+\.toml", README)) | set(re.findall(r"benchmarks/\w+\.py", README))
    assert len(named) >= 4
    for path in named | set(re.findall(r"tests/\w+\.py", README)) | set(re.findall(r"\]\((docs/[^)]+)\)", README)):
        assert (ROOT / path).exists(), path


def test_the_method_tables_are_what_the_strategies_declare() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/method_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_print_what_they_say(name: str) -> None:
    if name in HEAVY:
        pytest.importorskip(HEAVY[name])
    module = importlib.import_module(name)
    assert module.__doc__, "a module says what it is for"
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_there_are_docstring_examples() -> None:
    """Were doctest to find none, the test above would prove nothing."""
    finder = doctest.DocTestFinder()
    count = sum(bool(t.examples) for name in MODULES if name not in HEAVY
                for t in finder.find(importlib.import_module(name)))  # fmt: skip
    assert count >= 12
