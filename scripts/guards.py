"""Take out each guard of the gate and of the protocol once, and see that a test fails.

    python scripts/guards.py [--only WORD] [--part 1/2] [--list]

A guard is an `if` that ends in a refusal: it raises, or answers with a failure. Each is taken out whole (`if False`),
and where it has several conditions, each of them alone. The files below are those that stand between a server and its
sites; every guard in them is found by the script, so one that is new is tried too. One that survives is a hole in the
tests, unless EQUAL says why nobody could tell: the script then ends with code 1. The tests that reach a refusal with
every guard in its place are tried first, so most guards take seconds.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    "flower/app/flower_engine.py": "test_flower_link test_flower_rounds test_flower_roll",
    "flower/app/site.py": "test_farewell test_quota test_flower_rounds test_secure_sites",
    "flower/app/sealed_site.py": "test_secure_sites",
    "flower/app/frames.py": "test_flower",
    "flower/app/flower_records.py": "test_flower test_flower_arrays",
    "flower/deploy/gateway.py": "test_flower_gateway test_flower_link",
    "flower/deploy/fleet.py": "test_flower_link",
    "flower/deploy/bounded_answers.py": "test_flower_answers",
    "flower/deploy/invitation.py": "test_flower_answers test_authority test_secure_sites test_flower_serve",
    "flower/deploy/signature.py": "test_flower_gateway",
    "flower/deploy/node.py": "test_flower_link test_flower_answers test_flower_gateway",
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
HANGS = 3.0
"""So many times as long as with every guard in its place, and tests are taken to hang."""
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
        refusal: where in the text the refusal begins.
        span: the condition's begin and end in the text.
        text: as it is written.
    """

    file: str
    line: int
    refusal: int
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

    def guard(node: ast.expr, refusal: int) -> Guard:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        span = begins[node.lineno - 1] + node.col_offset, begins[node.end_lineno - 1] + node.end_col_offset
        return Guard(file, node.lineno, refusal, span, " ".join(text.encode()[slice(*span)].decode().split()))

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.If) and refuses(node.body[-1]):
            refusal = begins[node.body[-1].lineno - 1] + node.body[-1].col_offset
            yield guard(node.test, refusal)
            if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or):
                yield from (guard(value, refusal) for value in node.test.values)


def without(text: str, guard: Guard) -> str:
    """The source with the guard's condition never true."""
    whole = text.encode()
    return (whole[: guard.span[0]] + b"False" + whole[guard.span[1] :]).decode()


NOTED = """
import os
def at(refusal):
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    with open({path!r}, "a") as file:
        file.write(f"{{refusal}} {{test}}\\n")
"""
"""A module of the copy of the sources, which says which test comes to which refusal, whatever process it comes in."""


def reached(file: str) -> dict[int, list[str]] | None:
    """The tests that come to each refusal of a file, with every guard in its place; None: a test fails."""
    with copied() as source:
        path, noted = source / "florana" / file, source / "noted.txt"
        (source / "guards_noted.py").write_text(NOTED.format(path=str(noted)))
        text = path.read_bytes()
        for at in sorted({guard.refusal for guard in guards(file, text.decode())}, reverse=True):
            text = text[:at] + f"__import__('guards_noted').at({at}); ".encode() + text[at:]
        path.write_bytes(text)
        if not passes(source, whole(file)):
            return None
        tests = dict[int, list[str]]()
        for line in dict.fromkeys(noted.read_text().splitlines() if noted.exists() else []):
            refusal, _, test = line.partition(" ")
            tests.setdefault(int(refusal), []).extend([test] if test.startswith("tests/") else [])
        return tests


def survives(guard: Guard, first: list[str], most: float) -> bool:
    """Whether the tests of its file pass without a guard, in `most` seconds; first those that come to its refusal."""
    with copied() as source:
        path = source / "florana" / guard.file
        path.write_text(without(path.read_text(), guard))
        return (not first or passes(source, first, most)) and passes(source, whole(guard.file), most)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the sources."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        yield source


def whole(file: str) -> list[str]:
    """The test files that must notice."""
    return [f"tests/{name}.py" for name in FILES[file].split()]


def passes(source: Path, tests: list[str], most: float | None = None) -> bool:
    """Whether tests pass on that source in so many seconds: where nobody refuses, some wait for ever."""
    process = multiprocessing.get_context("fork").Process(target=tried, args=(source, tests))
    process.start()
    process.join(most)
    if process.is_alive() and process.pid is not None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode == 0


def tried(source: Path, tests: list[str]) -> None:
    """Run the tests on another source, in a process that was forked for it; ends with pytest's code."""
    os.setsid()  # what a test starts ends with it
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
    holes, known, most = 0, dict[str, dict[int, list[str]]](), dict[str, float]()
    for guard in chosen:
        words = "-"
        if not arguments.list and guard.file not in known:
            began = time.monotonic()
            tests = reached(guard.file)
            if tests is None:
                sys.exit(f"{FILES[guard.file]}: a test fails with every guard in its place")
            known[guard.file], most[guard.file] = tests, HANGS * (time.monotonic() - began)
        if not arguments.list:
            held = not survives(guard, known[guard.file].get(guard.refusal, []), most[guard.file])
            words = "killed" if held else "equal" if (guard.file, guard.text) in EQUAL else "SURVIVED"
            holes += words == "SURVIVED"
        print(f"{words:9}  {guard.file}:{guard.line}  {guard.text}", flush=True)
    print(f"{len(chosen) - holes} of {len(chosen)} guards")
    sys.exit(1 if holes else 0)


if __name__ == "__main__":
    main()
