"""The house: a module imports only from the floors below it, heavy libraries stay in their rooms, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "florana"
FLOORS = [
    {"errors"},
    {"whole_files"},
    {"factors", "threads"},
    {"linalg", "tensor_files", "module_patterns", "adapter_settings", "wrappers", "score"},
    {"adapter_config"},
    {"adapter_headers"},
    {"adapter_reader"},
    {"adapter_files"},
    {"aggregate"},
    {"robust"},
    {"strategy", "together", "merged", "merge_rules", "recipe_data"},
    {"recipe_robust", "recipe_server"},
    {"recipe", "recipe_file", "federation", "merge"},
    {"engine", "train", "run_folder", "inspection"},
    {"conduct"},
    {"run"},
    {"plan", "plan_model", "report", "study", "flower"},
    {"screen", "screen_study", "demo"},
    {"cli_adapters", "cli_compare", "cli_plan", "cli_flower"},
    {"cli", "__init__", "__main__"},
]
INSIDE = {  # within one floor or room: who may import whom
    "recipe_file": {"recipe"},
    "study": {"report"},
    "cli": set(),
    "__init__": set(),
    "__main__": {"cli"},
}
ROOMS = {
    "transformers": {"train"},
    "peft": {"train"},
    "datasets": {"train"},
    "flwr_datasets": {"train"},
    "sklearn": {"train"},
    "scipy": {"study", "train"},
    "pandas": {"train"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "safetensors": {"tensor_files", "federation"},
    "typer": {"cli", "cli_adapters", "cli_compare", "cli_plan", "cli_flower"},
    "rich": {"screen", "screen_study", "cli"},
    "pydantic": {"recipe", "recipe_data", "recipe_robust", "recipe_server", "recipe_file", "flower"},
    "flwr": {"flower"},
    "cryptography": {"flower"},
    "pydantic_core": {"module_patterns"},
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
            if there != here and floor(there) >= floor(here) and there not in INSIDE.get(here, set()):
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
    bad.write_text("from florana.run import execute\nimport peft\n")
    assert len(faults(bad, source="aggregate")) == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_and_help_are_light() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "matplotlib", "sklearn", "pandas", "flwr", "numpy"}
    assert not heavy & loaded_by("import florana, florana.cli")
    assert "torch" in loaded_by("import florana; florana.mean"), "this test must be able to fail"


def test_keys_are_made_without_waiting_for_torch() -> None:
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed")
    assert not {"torch", "numpy", "flwr"} & loaded_by("import florana.flower.keys")


def test_the_arithmetic_needs_no_training_library() -> None:
    heavy = {"transformers", "peft", "datasets", "matplotlib", "sklearn", "pandas", "flwr"}
    assert not heavy & loaded_by("import florana; florana.mean, florana.mix, florana.best_rank, florana.read_adapter")
    assert not heavy & loaded_by("import florana.federation.loop, florana.engine.local, florana.strategy")


def test_the_public_names_are_listed_and_there() -> None:
    import florana

    assert sorted(florana.__all__) == sorted(florana._MODULE_OF)
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
