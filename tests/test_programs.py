"""Programs that a model wrote: right verdicts, and nothing outside of them that they could touch."""

from __future__ import annotations

import ast
import dataclasses
import os
import warnings
from pathlib import Path

import pytest

from florana.errors import InputError
from florana.score import benchmarks, programs
from florana.score.code_tasks import mbpp_program
from florana.score.programs import Limits, run_program, run_programs
from florana.score.sandbox import BARRIERS
from tests.score_cases import HUMANEVAL, MBPP

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


QUICK = Limits(seconds=60.0, cpu_seconds=1, memory_mib=256)  # the clock is for those alone that take no processor time


@pytest.mark.usefixtures("runnable")
@pytest.mark.shared
def test_the_reference_solutions_of_humaneval_pass() -> None:
    rows = benchmarks.read_problems("humaneval", HUMANEVAL)
    assert len(rows) == 164
    scores = benchmarks.figures("humaneval", rows, [[row["canonical_solution"]] for row in rows], workers=2)
    assert scores == {"pass@1": 1.0, "stopped": 0.0, "shut_in": 1.0}


@pytest.mark.usefixtures("runnable")
@pytest.mark.shared
def test_the_reference_solutions_of_mbpp_pass_and_broken_ones_do_not() -> None:
    """Every sixth of 974 here; `scripts/score_references.py` runs all."""
    rows = [row for row in benchmarks.read_all("mbpp", MBPP) if row["task_id"] % 6 == 1]
    pairs = [mbpp_program(row, row["code"]) for row in rows]
    assert [v for v in run_programs(pairs, workers=2) if not v.passed] == []
    setup = [row for row in benchmarks.read_all("mbpp", MBPP) if row["test_setup_code"]]
    assert [run_program(*mbpp_program(row, row["code"])).reason for row in setup] == ["passed", "passed"]
    verdicts = run_programs([mbpp_program(row, without_bodies(row["code"])) for row in rows[:40]], workers=2)
    assert not any(verdict.passed for verdict in verdicts)


def without_bodies(code: str) -> str:
    """The program with `return None` for every function's body."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MBPP's own escapes
        tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Return(ast.Constant(None))]
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.usefixtures("runnable")
@pytest.mark.shared
@pytest.mark.parametrize("broken", ["    return None\n", "    return (\n", "    raise SystemExit(0)\n", ""])
def test_broken_solutions_of_humaneval_do_not_pass(broken: str) -> None:
    rows = benchmarks.read_problems("humaneval", HUMANEVAL)[::8]
    assert benchmarks.figures("humaneval", rows, [[broken]] * len(rows), workers=2)["pass@1"] == 0.0


@pytest.mark.usefixtures("runnable")
def test_off_by_one_is_a_failure_that_names_the_line() -> None:
    verdict = run_program("def f(x):\n    return x + 1", "assert f(0) == 1\nassert f(1) == 3")
    assert (verdict.passed, verdict.reason) == (False, "failed")
    assert "line 2 of the tests" in verdict.detail


@pytest.mark.usefixtures("runnable")
def test_one_more_process_or_signal_is_refused_by_the_kernel() -> None:
    """Asked once, harmlessly, before any test below does worse."""
    for namespaces in (True, False):
        for program in ("import os\nif os.fork() == 0: os._exit(0)", "import os\nos.kill(os.getppid(), 0)"):
            assert "PermissionError" in run_program(program, "", QUICK, namespaces=namespaces).detail


# Each is bounded in what it could do, should a barrier ever be missing: 64 processes, 1 GB, 40 MiB on disk, a minute.
HOSTILE: dict[str, tuple[str, set[str]]] = {
    "forks": ("import os\nfor _ in range(6): os.fork()", {"error"}),
    "threads": ("import threading\nthreading.Thread(target=print).start()", {"error"}),
    "starts a program": ("import subprocess\nsubprocess.run(['true'])", {"error"}),
    "fills a file": ("open('f', 'wb').write(b'x' * 2**25)", {"files"}),
    "fills the disk": ("for i in range(40): open(f'f{i}', 'wb').write(b'x' * 2**20)", {"files"}),
    "never ends": ("while True: pass", {"timeout"}),
    "will not be interrupted": ("while True:\n try:\n  while True: pass\n except BaseException: pass", {"timeout"}),
    "sleeps": ("import time\ntime.sleep(60)", {"timeout"}),
    "leaves its group": ("import os, time\nos.setsid()\ntime.sleep(60)", {"timeout"}),
    "takes memory": ("rows = ['x' * 10**6 + str(i) for i in range(1000)]", {"memory"}),
    "leaves at once": ("import os\nos._exit(0)", {"unfinished"}),
    "exits": ("import sys\nsys.exit(0)", {"unfinished"}),
    "connects": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", {"error"}),
    "asks for input": ("input()", {"error"}),
    "crashes": ("import ctypes\nctypes.string_at(0)", {"error"}),
    "is no Python": ("def f(:", {"error"}),
    "holds a null": ("x = '\0'", {"error"}),
    "closes everything": ("import os\nos.closerange(0, 64)\nos._exit(0)", {"unfinished"}),
    "raises to its limits": ("import resource as r\nr.setrlimit(r.RLIMIT_CPU, (99, 99))", {"error"}),
    "floods its pipes": (
        "import os\nfor fd in range(3, 20):\n try:\n"
        '  for _ in range(9999): os.write(fd, b\'{"reason": "passed"}\\n\' * 99)\n except OSError: pass',
        {"unfinished", "timeout", "failed"},  # whichever is first: the limit, or the honest end of the tests
    ),
    "claims": ("print('passed')\nprint('a' * 64)\nimport os\nos.write(1, b'b' * 64)\nassert False", {"failed"}),
}


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_ends_with_the_right_verdict(name: str) -> None:
    program, reasons = HOSTILE[name]
    if name == "fills the disk" and run_program("open('/proc/self/status')", "").passed:
        pytest.skip("this kernel lets nobody make namespaces: the number of files is not limited")
    sleeps = "time.sleep" in program
    limits = dataclasses.replace(QUICK, seconds=4.0) if sleeps else QUICK
    verdict = run_program(program, "assert False", limits)  # to pass would be a lie
    assert verdict.reason in reasons, verdict
    assert not verdict.passed
    assert ("not done after" in verdict.detail) == sleeps, "all others end long before the clock ends them"
    assert set(verdict.barriers) == set(BARRIERS)


@pytest.mark.usefixtures("runnable")
def test_a_program_cannot_speak_for_the_harness() -> None:
    line = b"\n" + repr({"refused": True, "barriers": [], "reason": "timeout"}).encode() + b"\n"
    program = f"import os\nfor fd in range(3, 64):\n try: os.write(fd, {line!r})\n except OSError: pass"
    verdict = run_program(program, "assert False", QUICK)
    assert not verdict.passed
    assert set(verdict.barriers) == set(BARRIERS)


@pytest.mark.usefixtures("runnable")
def test_processor_time_ends_a_program_before_the_clock_does() -> None:
    verdict = run_program("while True: pass", "", QUICK)
    assert (verdict.reason, verdict.detail) == ("timeout", "used 1 s of processor time")


@pytest.mark.usefixtures("runnable")
def test_a_files_size_is_limited_on_disk_too() -> None:
    program, reasons = HOSTILE["fills a file"]
    assert run_program(program, "", QUICK, namespaces=False).reason in reasons


@pytest.mark.usefixtures("runnable")
def test_exits_inside_the_tests_are_no_pass_either() -> None:
    for way in ("import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()"):
        assert run_program(f"def f():\n    {way}", "assert f() or True").reason == "unfinished"


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("namespaces", [True, False])
def test_nothing_outside_is_written_and_no_environment_read(
    namespaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without namespaces: Landlock alone must hold too."""
    monkeypatch.setenv("FLORANA_SECRET", "hush")
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o666)
    for attempt in (
        f"open({str(victim)!r}, 'w')",
        f"os.unlink({str(victim)!r})",
        f"os.truncate({str(victim)!r}, 0)",
        f"os.chmod({str(victim)!r}, 0)",
        f"os.mkdir({str(tmp_path / 'new')!r})",
        f"os.rename({str(victim)!r}, {str(tmp_path / 'moved')!r})",
        f"open('/proc/{os.getpid()}/environ').read()",
    ):
        verdict = run_program(f"import os\n{attempt}", "", QUICK, namespaces=namespaces)
        assert verdict.reason == "error", (attempt, verdict)
    assert victim.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    inside = (
        "import os\nassert 'FLORANA_SECRET' not in os.environ\nassert os.listdir() == []\nopen('mine', 'w').write('x')"
    )
    assert run_program(inside, "assert open('mine').read() == 'x'", QUICK, namespaces=namespaces).passed


def test_root_without_every_barrier_runs_nothing() -> None:
    said = b"{'barriers': ['network'], 'refused': True}\n"
    with pytest.raises(InputError, match="not run by root") as caught:
        programs._verdict(said, "token", QUICK)
    assert "processes, files" in str(caught.value)


@pytest.mark.usefixtures("runnable")
def test_what_is_common_in_real_answers_works() -> None:
    fine = [
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n x: int",
            "A(1)",
        ),
        ("import asyncio\nasync def f(): return 3", "assert asyncio.run(f()) == 3"),
        ("import numpy", "assert numpy.zeros(3).sum() == 0"),
        ("if __name__ == '__main__': input()", "assert True"),
        ("def f(): return {'a', 'b', 'c', 'd'}", "assert list(f()) == list(f())"),
    ]
    verdicts = run_programs(fine, workers=2)
    assert [v.detail for v in verdicts if not v.passed] == []


@pytest.mark.usefixtures("runnable")
def test_a_set_of_strings_has_one_order_so_that_verdicts_do_not_vary() -> None:
    program = "def f(): raise ValueError(' '.join({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert len({run_program(program, "f()").detail for _ in range(3)}) == 1
