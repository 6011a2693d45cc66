"""Take out each guard of the gate and of the protocol once, and see that a test fails.

    python scripts/guards.py [--only WORD] [--part 1/2] [--list]

A guard is an `if` that ends in a refusal: it raises, or answers with a failure. Each is taken out whole (`if False`),
and where it has several conditions, each of them alone. The files below are those that stand between a server and its
sites; every guard in them is found by the script, so one that is new is tried too. One that survives is a hole in the
tests, unless EQUAL says why nobody could tell: the script then ends with code 1.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SEALED = "test_sealed test_secure test_secure_sites"
KEYS = "test_authority test_flower"
# file -> the tests that must notice, the likeliest first
FILES = {
    "federation/gate.py": "test_wire test_weighing test_loop test_sums",
    "federation/gather.py": "test_sums test_limits",
    "federation/sealed_client.py": SEALED,
    "federation/sealed_sums.py": SEALED,
    "federation/sealed_question.py": SEALED,
    "secure/member.py": SEALED,
    "secure/opening.py": SEALED,
    "secure/wire.py": SEALED,
    "flower/app/codec.py": "test_flower test_flower_rounds",
    "flower/app/registration.py": "test_flower_roll",
    "flower/app/flower_engine.py": "test_flower_rounds test_flower_roll",
    "flower/app/site.py": "test_quota test_farewell test_flower_rounds test_secure_sites",
    "flower/app/sealed_site.py": "test_secure_sites",
    "flower/app/frames.py": "test_flower",
    "flower/app/flower_records.py": "test_flower test_flower_arrays",
    "flower/deploy/gateway.py": "test_flower_gateway test_flower_link",
    "flower/deploy/fleet.py": "test_flower_link",
    "flower/deploy/signature.py": "test_flower_gateway",
    "flower/deploy/node.py": "test_flower_link test_flower_gateway",
    "flower/deploy/quota.py": "test_quota",
    "flower/deploy/one_run.py": "test_flower_serve",
    "flower/deploy/live_roster.py": KEYS,
    "flower/deploy/roster.py": KEYS,
    "flower/deploy/authority.py": KEYS,
    "flower/deploy/keys.py": KEYS,
    "flower/deploy/site_signatures.py": "test_secure_sites",
    "train/private_clients.py": "test_private",
    "bounded.py": "test_bombs",
}

BROUGHT = [
    "torch",
    "transformers",
    "peft.tuners.lora",
    "datasets",
    "sklearn.metrics",
    "scipy.stats",
    "flwr_datasets.partitioner",
]
"""Imported once, before a trial is forked."""
QUIET = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]

# (file, the condition): why taking it out changes nothing that anyone could see
EQUAL: dict[tuple[str, str], str] = {
    (
        "flower/deploy/authority.py",
        "not isinstance(key, ec.EllipticCurvePrivateKey)",
    ): "a key of another kind has another public key, which the condition beside it refuses; this one is for the types",
}


@dataclass(frozen=True)
class Guard:
    """A condition that is taken out.

    Args:
        file: below src/florana.
        line: where it begins.
        span: its begin and end in the text.
        text: as it is written.
    """

    file: str
    line: int
    span: tuple[int, int]
    text: str


def refuses(statement: ast.stmt) -> bool:
    """Whether a statement is a refusal: it raises, or returns a failure, a text of one, or 'changed'."""
    if isinstance(statement, ast.Raise):
        return True
    if not isinstance(statement, ast.Return) or statement.value is None:
        return False
    said = ast.unparse(statement.value)
    return said.startswith(("Failure(", "failure_frame(", "Frame('changed'", "f'", 'f"', "refused(", "Response(status"))


def guards(file: str, text: str) -> Iterator[Guard]:
    """Every guard of a file."""
    begins = [0]
    for line in text.splitlines(keepends=True):
        begins.append(begins[-1] + len(line.encode()))

    def guard(node: ast.expr) -> Guard:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        span = begins[node.lineno - 1] + node.col_offset, begins[node.end_lineno - 1] + node.end_col_offset
        return Guard(file, node.lineno, span, " ".join(text.encode()[slice(*span)].decode().split()))

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.If) and refuses(node.body[-1]):
            yield guard(node.test)
            if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or):
                yield from map(guard, node.test.values)


def without(text: str, guard: Guard) -> str:
    """The source with the guard's condition never true."""
    whole = text.encode()
    return (whole[: guard.span[0]] + b"False" + whole[guard.span[1] :]).decode()


def survives(guard: Guard | None, file: str) -> bool:
    """Whether the tests of a file pass without a guard of it; None: with all of them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        if guard is not None:
            path = source / "florana" / file
            path.write_text(without(path.read_text(), guard))
        tests = [f"tests/{name}.py" for name in FILES[file].split()]
        process = multiprocessing.get_context("fork").Process(target=tried, args=(source, tests))
        process.start()
        process.join()
        return process.exitcode == 0


def tried(source: Path, tests: list[str]) -> None:
    """Run the tests on another source, in a process that was forked for it; ends with pytest's code."""
    os.chdir(ROOT)
    os.environ |= {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(source), str(ROOT)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os._exit(pytest.main([*QUIET, *tests]))


def main() -> None:
    for name in BROUGHT:  # of florana itself each trial imports its own
        importlib.import_module(name)
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="1/1", help="such as 2/3: every third guard, from the second on")
    parser.add_argument("--list", action="store_true", help="say which there are")
    arguments = parser.parse_args()
    every = [guard for file in FILES for guard in guards(file, (ROOT / "src" / "florana" / file).read_text())]
    part, parts = (int(number) for number in arguments.part.split("/"))
    chosen = [guard for guard in every if arguments.only in f"{guard.file} {guard.text}"][part - 1 :: parts]
    holes, sound = 0, set[str]()
    for guard in chosen:
        words = "-"
        if not arguments.list and FILES[guard.file] not in sound:
            sound.add(FILES[guard.file])
            if not survives(None, guard.file):
                sys.exit(f"{FILES[guard.file]}: a test fails with every guard in its place")
        if not arguments.list:
            held = not survives(guard, guard.file)
            words = "killed" if held else "equal" if (guard.file, guard.text) in EQUAL else "SURVIVED"
            holes += words == "SURVIVED"
        print(f"{words:9}  {guard.file}:{guard.line}  {guard.text}", flush=True)
    print(f"{len(chosen) - holes} of {len(chosen)} guards")
    sys.exit(1 if holes else 0)


if __name__ == "__main__":
    main()
