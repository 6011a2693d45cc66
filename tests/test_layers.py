"""The house: a module imports only from the floors below it, heavy libraries stay in their rooms, files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "florana"
FLOORS = [
    {"errors"},
    {"atomic_files", "displayable", "bounded", "other_names"},
    {"dp", "lora", "score", "secure"},
    {"aggregate"},
    {"robust", "adapters"},
    {"strategy"},
    {"recipe", "federation"},
    {"train"},
    {"runs"},
    {"report", "track"},
    {"study", "flower", "demo"},
    {"cli", "__init__"},
    {"__main__"},
]
"""A room imports from the floors below it only; within a room, `test_no_circle` holds its files."""
ROOMS = {
    "transformers": {"train"},
    "peft": {"train"},
    "datasets": {"train"},
    "flwr_datasets": {"train"},
    "sklearn": {"train"},
    "scipy": {"dp", "study", "train"},
    "pandas": {"train"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "safetensors": {"adapters", "federation"},
    "typer": {"cli"},
    "rich": {"cli"},
    "pydantic": {"recipe", "flower"},
    "flwr": {"flower"},
    "cryptography": {"dp", "flower", "secure"},
    "dp_accounting": {"dp"},
    "Crypto": {"secure"},
    "re2": {"adapters"},
    "tensorboard": {"track"},
    "wandb": {"track"},
    "mlflow": {"track"},
}


def place(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of a file, those inside functions and TYPE_CHECKING too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "florana":
                found += [(node.lineno, f"florana.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def faults(path: Path, source: str | None = None) -> list[str]:
    here, wrong = source or place(path), []
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        if top == "florana" and rest:
            there = rest.split(".")[0]
            if there != here and floor(there) >= floor(here):
                wrong.append(f"{path.name}:{line}: {here} imports {there}, which is not below it")
        elif top in ROOMS and here not in ROOMS[top]:
            wrong.append(f"{path.name}:{line}: {here} imports {top}")
    return wrong


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_below(path: Path) -> None:
    assert faults(path) == []


def test_the_import_rule_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from florana.runs.setup import execute\nimport peft\n")
    assert len(faults(bad, source="aggregate")) == 2


def dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def below(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file imports: for `from package import name`, the module of that name where there is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or {node.module}
    return (found & modules) - {dotted(path)}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules that no order satisfies; empty where there is no circle."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle() -> None:
    modules = {dotted(path) for path in FILES}
    assert circle({dotted(path): below(path, modules) for path in FILES if path.name != "__init__.py"}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}), "this test must be able to fail"


def test_no_two_modules_of_one_name() -> None:
    names = Counter(path.stem for path in FILES if not path.stem.startswith("__"))
    assert [name for name, files in names.items() if files > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_and_help_are_light() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "matplotlib", "sklearn", "pandas", "flwr", "numpy"}
    assert not heavy & loaded_by("import florana, florana.cli.main")
    assert "torch" in loaded_by("import florana; florana.mean"), "this test must be able to fail"


def test_keys_are_made_without_waiting_for_torch() -> None:
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed")
    assert not {"torch", "numpy", "flwr"} & loaded_by("import florana.flower.deploy.keys")


def test_the_arithmetic_needs_no_training_library() -> None:
    heavy = {"transformers", "peft", "datasets", "matplotlib", "sklearn", "pandas", "flwr"}
    assert not heavy & loaded_by("import florana; florana.mean, florana.mix, florana.best_rank, florana.read_adapter")
    assert not heavy & loaded_by("import florana.federation.loop, florana.federation.local_engine, florana.strategy")


def test_the_public_names_are_listed_and_there() -> None:
    import florana

    assert {"merge", "inspect", "best_rank", "mix", "execute"} <= set(florana.__all__)
    for name in florana.__all__:
        assert getattr(florana, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = florana.nothing


def test_no_pickle_and_no_torch_load() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), path
        assert not {name for _, name in imports(path)} & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}


def test_the_page_draws_the_floors_that_are_held() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (`[^|]+`) \|", page, re.MULTILINE)
    drawn = {int(level): set(re.findall(r"`(\w+)`", rooms)) for level, rooms in rows}
    assert drawn == dict(enumerate(FLOORS, 1))
    for name in set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", page)):
        assert list(SOURCE.rglob(name)) or list(ROOT.glob(name)), f"{name} is not there"
