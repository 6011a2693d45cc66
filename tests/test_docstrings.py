"""Docstrings that a tool can read: Google style, one name on each line, every name there is and none else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "florana"
FILES = sorted(SOURCE.rglob("*.py"))
ENTRY = re.compile(r"\*{0,2}[A-Za-z_]\w*: \S")
SECOND = r"[.;] {name}: "


def parameters(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """What can be given: of a function its parameters, of a class its public fields, else those of __init__."""
    if isinstance(node, ast.ClassDef):
        fields = [
            inner.target.id
            for inner in node.body
            if isinstance(inner, ast.AnnAssign)
            and isinstance(inner.target, ast.Name)
            and inner.target.id[0] != "_"
            and "ClassVar" not in ast.unparse(inner.annotation)
        ]
        inits = [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
        return fields or [name for init in inits for name in parameters(init)]
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [one.arg for one in every if one is not None and one.arg not in ("self", "cls")]


def entries(docstring: str, heading: str) -> list[str] | None:
    """The entries of a section, each with its continuation lines; None where there is no such section."""
    found = re.search(rf"^{heading}:\n((?:    .*\n?)+)", docstring, re.MULTILINE)
    if found is None:
        return None
    return [entry.replace("\n        ", " ") for entry in re.split(r"\n(?=    \S)", found[1].rstrip())]


def faults(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    docstring = ast.get_docstring(node) or ""
    wrong = []
    args, names = entries(docstring, "Args"), parameters(node)
    errors = entries(docstring, "Raises") or []
    for entry in [*(args or []), *errors]:
        if not ENTRY.match(entry.strip()):
            wrong.append(f"{node.name}: not 'name: text': {entry.strip()}")
    for entry in errors:
        if re.search(r"[.;] [A-Z]\w*(Error|RejectedUpdate|Update): ", entry):
            wrong.append(f"{node.name}: two errors in one entry: {entry.strip()}")
    if args is None:
        return wrong
    documented = [entry.strip().partition(":")[0].lstrip("*") for entry in args]
    if documented != [name for name in names if name in documented]:
        wrong.append(f"{node.name}: Args has {documented}, the signature {names}")
    if len(names) > 2 and set(names) != set(documented):
        wrong.append(f"{node.name}: Args lacks {sorted(set(names) - set(documented))}")
    for entry in args:
        others = [name for name in names if re.search(SECOND.format(name=re.escape(name)), entry)]
        if others:
            wrong.append(f"{node.name}: {others} in the entry of another: {entry.strip()}")
    return wrong


def public(tree: ast.AST) -> list[ast.FunctionDef | ast.ClassDef]:
    found: list[ast.FunctionDef | ast.ClassDef] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_argument_has_a_line_of_its_own(path: Path) -> None:
    assert [fault for node in public(ast.parse(path.read_text())) for fault in faults(node)] == []


@pytest.mark.parametrize(
    "section",
    [
        "a: one.\n        b, c: two.",
        "a: one. b: two.\n        c: three.",
        "a: one.\n        b: two.",
        "a: one.\n        b: two.\n        c: three.\n        d: four.",
        "b: two.\n        a: one.\n        c: three.",
        "a: one.\n        b: two.\n        c: three.\n\n    Raises:\n        ValueError: one. KeyError: two.",
        "a: one.\n        b: two.\n        c\n",
    ],
)
def test_the_rule_can_fail(section: str) -> None:
    source = f'def f(a, b, c):\n    """Do it.\n\n    Args:\n        {section}\n    """\n'
    (node,) = public(ast.parse(source))
    assert faults(node)


def test_every_public_function_and_class_says_what_it_does() -> None:
    silent = [
        f"{path.relative_to(SOURCE)}: {node.name}"
        for path in FILES
        for node in public(ast.parse(path.read_text()))
        if not ast.get_docstring(node)
    ]
    assert silent == []
