"""Scoring what a model writes: answers, programs behind their barriers, pass@k, generation, [generation] in a run."""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from florana.errors import InputError, RecipeError
from florana.recipe import Model
from florana.recipe_file import check, read_recipe
from florana.run import execute
from florana.score import programs, tasks
from florana.score.answers import boxed, last_number, marked_number, same_expression, same_number, written_answer
from florana.score.code_tasks import HUMANEVAL_STOPS, cut_at, humaneval_program, mbpp_program, pass_at_k
from florana.score.latex import normal
from florana.score.programs import Limits, Verdict, run_program, run_programs
from florana.score.sandbox import BARRIERS
from florana.train.generate import Written, generate
from florana.train.model import Workbench
from tests.conftest import SHARED

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
HUMANEVAL = SHARED / "humaneval" / "HumanEval.jsonl.gz"
MBPP = SHARED / "mbpp" / "mbpp.jsonl"
QUICK = Limits(seconds=2.5, cpu_seconds=1, memory_mib=256)


@pytest.fixture(scope="module")
def runnable() -> None:
    """Root is refused where the kernel holds not every barrier; everyone else runs the tests that need programs."""
    try:
        run_program("", "")
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.shared
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_gold_answer_of_gsm8k_is_extracted_and_no_corrupted_one(split: str, count: int) -> None:
    rows = tasks.read_problems("gsm8k", SHARED / "gsm8k" / f"{split}.jsonl")
    right = tasks.figures("gsm8k", rows, [[row["answer"]] for row in rows])
    assert len(rows) == count
    assert right == {"exact_match": 1.0, "exact_match_flexible": 1.0, "unparsed": 0.0}
    if split == "train":
        return
    wrong = tasks.figures("gsm8k", rows, [[row["answer"] + "1"] for row in rows])
    assert wrong == {"exact_match": 0.0, "exact_match_flexible": 0.0, "unparsed": 0.0}
    none = tasks.figures("gsm8k", rows, [[row["answer"].split("####")[0]] for row in rows])
    assert none["exact_match"] == 0.0
    assert none["unparsed"] == 1.0


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 72", "72", "72"),
        ("#### -3,450.5 dollars", "-3,450.5", "-3,450.5"),
        ("#### $18", None, "$18"),
        ("first #### 5\nthen #### 6", "5", "6"),
        ("the answer is 7.", None, "7."),
        ("no number", None, None),
        ("####72", None, "72"),
        ("", None, None),
    ],
)
def test_numbers_are_found_where_lm_eval_finds_them(text: str, strict: str | None, flexible: str | None) -> None:
    assert marked_number(text) == strict
    assert last_number(text) == flexible


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("1,450", "1450", True),
        ("$18.", "18", True),
        ("-3", "-3", True),
        ("3", "-3", False),
        ("2.0", "2", False),
        (None, "2", False),
    ],
)
def test_numbers_are_compared_as_lm_eval_compares_them(answer: str | None, gold: str, same: bool) -> None:
    assert same_number(answer, f"so.\n#### {gold}") is same


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"$\fbox{3}$", "3"),
        (r"is $\boxed 5$.", "5"),
        (r"\boxed{\text{(A)}", None),
        (r"\boxed", None),
        ("no box", None),
    ],
)
def test_the_last_box_is_read_to_its_own_brace(text: str, found: str | None) -> None:
    assert boxed(text) == found


SAME = [
    (r"\dfrac{3}{4}", r"\frac34"),
    (r"\tfrac12", "0.5"),
    ("3/4", r"\frac{3}{4}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$12", "12"),
    (r"15\%", "15"),
    (r"10\text{ cm}", "10"),
    (".5", "0.5"),
    (r"\frac{.5}{2}", r"\frac{0.5}{2}"),
    ("x = 7", "7"),
    (r"1\!000", "1000"),
    ("x +\n1", "x+1"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_answers_of_math_that_the_papers_rules_make_one(left: str, right: str) -> None:
    assert left != right
    assert same_expression(left, right)
    assert normal(normal(left)) == normal(left)


@pytest.mark.parametrize(
    ("left", "right"),
    [("x+1", "1+x"), ("2", "2.0"), ("1/3", "1/2"), ("abc = 7", "7"), ("", "0"), (None, None), (r"\sqrt", "1")],
)
def test_answers_of_math_that_stay_apart(left: str | None, right: str | None) -> None:
    assert not same_expression(left, right)


def test_math_is_scored_on_the_box_else_on_the_formula_else_on_all() -> None:
    rows = [{"problem": "?", "solution": r"so $\boxed{\frac12}$."}] * 4
    texts = [[r"Hence \boxed{1/2}."], ["it is $0.5$"], [" 0.5 "], [r"\boxed{1"]]
    assert tasks.figures("math", rows, texts) == {"exact_match": 0.75, "unparsed": 0.25}
    assert written_answer("") is None


@pytest.mark.usefixtures("runnable")
@pytest.mark.shared
def test_the_reference_solutions_of_humaneval_pass() -> None:
    rows = tasks.read_problems("humaneval", HUMANEVAL)
    assert len(rows) == 164
    scores = tasks.figures("humaneval", rows, [[row["canonical_solution"]] for row in rows], workers=2)
    assert scores == {"pass@1": 1.0, "stopped": 0.0, "shut_in": 1.0}


@pytest.mark.usefixtures("runnable")
@pytest.mark.shared
def test_the_reference_solutions_of_mbpp_pass_and_broken_ones_do_not() -> None:
    """Every sixth of 974 here; `scripts/score_references.py` runs all."""
    rows = [row for row in tasks.read_all("mbpp", MBPP) if row["task_id"] % 6 == 1]
    pairs = [mbpp_program(row, row["code"]) for row in rows]
    assert [v for v in run_programs(pairs, workers=2) if not v.passed] == []
    setup = [row for row in tasks.read_all("mbpp", MBPP) if row["test_setup_code"]]
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
    rows = tasks.read_problems("humaneval", HUMANEVAL)[::8]
    assert tasks.figures("humaneval", rows, [[broken]] * len(rows), workers=2)["pass@1"] == 0.0


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
def test_a_hostile_program_ends_soon_with_the_right_verdict(name: str) -> None:
    program, reasons = HOSTILE[name]
    if name == "fills the disk" and run_program("open('/proc/self/status')", "").passed:
        pytest.skip("this kernel lets nobody make namespaces: the number of files is not limited")
    started = time.monotonic()
    verdict = run_program(program, "assert False", QUICK)  # to pass would be a lie
    assert verdict.reason in reasons, verdict
    assert not verdict.passed
    assert time.monotonic() - started < 15
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
    verdict = run_program("while True: pass", "", dataclasses.replace(QUICK, seconds=60.0))
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


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 3, 4), (4, 4, 2), (7, 1, 7)])
def test_pass_at_k_is_the_mean_over_all_draws(samples: int, passed: int, k: int) -> None:
    marks = [1] * passed + [0] * (samples - passed)
    brute = statistics.mean(any(draw) for draw in itertools.combinations(marks, k))
    assert pass_at_k(samples, passed, k) == pytest.approx(brute)


@pytest.mark.usefixtures("runnable")
def test_pass_at_k_of_several_problems_counts_each_problem_once() -> None:
    row = {"prompt": "def f():\n", "test": "def check(g):\n    assert g() == 1", "entry_point": "f"}
    texts = [["    return 1", "    return 2"], ["    return 2", "    return 2"]]
    scores = tasks.figures("humaneval", [row, row], texts, ks=(1, 2), workers=2)
    assert (scores["pass@1"], scores["pass@2"]) == (0.25, 0.5)
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at_k(2, 1, 3)


@pytest.mark.usefixtures("runnable")
def test_completions_are_cut_at_the_first_stop() -> None:
    row = {"prompt": "def f():\n", "test": "def check(g):\n    assert g() == 1", "entry_point": "f"}
    text = "    return 1\n\nprint(f())\n\ndef other(:"
    assert cut_at(text, HUMANEVAL_STOPS) == "    return 1\n"
    assert not run_program(*humaneval_program(row, text)).passed
    assert tasks.figures("humaneval", [row], [[text]])["pass@1"] == 1.0
    assert cut_at("a b", ("c",)) == "a b"


@pytest.mark.shared
def test_prompts_are_those_of_lm_eval() -> None:
    shots = tasks.read_examples("mbpp", MBPP)
    rows = tasks.read_problems("mbpp", MBPP)
    assert [row["task_id"] for row in rows] == list(range(11, 511))
    assert [row["task_id"] for row in shots] == list(range(2, 11))
    text = tasks.prompt("mbpp", rows[0], shots[:1])
    assert text.startswith("You are an expert Python programmer, and here is your task: Write a function to find the ")
    assert text.count("[BEGIN]\n") == 2
    assert text.count("\n[DONE]\n\nYou are") == 1
    assert text.endswith(f"{rows[0]['test_list'][2]}\n[BEGIN]\n")
    gsm = {"question": "2 + 2?", "answer": "#### 4"}
    assert tasks.prompt("gsm8k", gsm, [gsm]) == "Question: 2 + 2?\nAnswer: #### 4\n\nQuestion: 2 + 2?\nAnswer:"
    assert tasks.prompt("gsm8k", gsm, template="{question}") == "2 + 2?"
    with pytest.raises(InputError, match=r"generation\.prompt cannot be filled"):
        tasks.prompt("gsm8k", gsm, template="{query}")


@pytest.mark.parametrize(
    ("task", "content", "words"),
    [
        ("gsm8k", None, "does not exist"),
        ("gsm8k", b"", "holds no rows"),
        ("gsm8k", b"{", "neither JSON nor JSON lines"),
        ("gsm8k", b"\xff\xfe", "cannot be read"),
        ("gsm8k", b"\x1f\x8bnot gzip", "cannot be read"),
        ("gsm8k", b"[3]", "row 1 is no JSON object"),
        ("gsm8k", b'{"question": "?", "anser": "#### 3"}', "did you mean 'anser'"),
        ("gsm8k", b'{"question": "?", "answer": "3"}', "no '#### ' before its number"),
        ("math", b'{"problem": "?", "solution": "3"}', "no \\boxed{...} answer"),
        ("mbpp", b'{"text": "?", "code": "", "test_list": "x"}', "is no list of tests"),
    ],
)
def test_files_of_problems_that_cannot_be_used(task: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        tasks.read_problems(task, path)
    assert words in str(caught.value)


PROMPTS = ["Once upon a time", "The little dog wanted to play, but it was raining. So he", "One day, Tim", "Lily saw a"]


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(Model(base=str(SHARED / "models" / "stories260K")), "causal-lm", (), 0)


def write(bench: Workbench, **changes: Any) -> Written:
    return generate(bench, PROMPTS, **{"max_new_tokens": 24, **changes})


@pytest.mark.shared
def test_greedy_generation_is_that_of_transformers_alone_and_in_a_batch(bench: Workbench) -> None:
    together, alone = write(bench), write(bench, batch_size=1)
    assert together == alone
    for prompt, (text,) in zip(PROMPTS, together.texts, strict=True):
        ids = [1, *bench.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        out = bench.model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, do_sample=False
        )
        assert bench.tokenizer.decode(out[0], skip_special_tokens=True) == prompt + text


@pytest.mark.shared
def test_samples_depend_on_the_seed_and_the_prompt_and_on_nothing_else(bench: Workbench) -> None:
    drawn = write(bench, temperature=0.8, samples=2, seed=1)
    torch.manual_seed(3)
    assert drawn == write(bench, temperature=0.8, samples=2, seed=1, batch_size=3)
    assert drawn != write(bench, temperature=0.8, samples=2, seed=2)
    assert all(first != second for first, second in drawn.texts)
    assert write(bench, temperature=1e-4, seed=1) == write(bench)


@pytest.mark.shared
def test_samples_have_the_softmaxs_frequencies(bench: Workbench) -> None:
    ids = torch.tensor([[1, *bench.tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        chances = (bench.model(input_ids=ids).logits[0, -1] / 2.0).softmax(-1)
    texts = generate(bench, ["Once upon a time"], max_new_tokens=1, temperature=2.0, samples=600, batch_size=600).texts[
        0
    ]
    likely = bench.tokenizer.decode([1, int(chances.argmax())], skip_special_tokens=True)
    share = statistics.mean(text == likely for text in texts)
    assert share == pytest.approx(float(chances.max()), abs=4 * (0.25 / 600) ** 0.5)


@pytest.mark.shared
def test_stops_end_a_text_and_long_prompts_lose_their_beginning(bench: Workbench) -> None:
    whole = write(bench).texts[0][0]
    assert " little" in whole
    assert write(bench, stops=[" little", "zzz"]).texts[0][0] == whole.split(" little")[0]
    long = "Tim was sad. " * 200 + PROMPTS[0]
    cut = generate(bench, [long, PROMPTS[0]], max_new_tokens=24)
    assert cut.cut_prompts == 1
    with pytest.raises(InputError, match="the model's context has 512 tokens"):
        write(bench, max_new_tokens=512)


@pytest.fixture
def table() -> dict[str, Any]:
    return {
        "task": "causal-lm",
        "seed": 5,
        "model": {"base": str(SHARED / "models" / "stories260K"), "target_modules": ["q_proj"], "rank": 2},
        "data": {
            "train": str(SHARED / "gsm8k" / "train.jsonl"),
            "test": str(SHARED / "gsm8k" / "test.jsonl"),
            "text": ["question", "answer"],
            "max_length": 32,
            "train_limit": 40,
            "test_limit": 4,
        },
        "partition": {"kind": "iid", "clients": 2},
        "train": {"steps": 1, "batch_size": 2},
        "federation": {"rounds": 3},
        "strategy": {"name": "best-rank"},
        "generation": {
            "task": "gsm8k",
            "file": str(SHARED / "gsm8k" / "test.jsonl"),
            "limit": 3,
            "max_new_tokens": 8,
            "shots": 1,
        },
    }


@pytest.mark.shared
def test_a_run_scores_what_the_global_model_writes_when_it_is_due(table: dict[str, Any], tmp_path: Path) -> None:
    first = execute(check(table, "r"), tmp_path / "last")
    assert [set(r.eval["global"]) for r in first.records[:2]] == [{"loss", "perplexity"}] * 2
    assert {"exact_match", "exact_match_flexible", "unparsed", "cut_prompts"} < set(first.records[-1].eval["global"])
    table["generation"]["every"] = 2
    table["evaluate"] = {"every": 3}
    every = execute(read_back(table, tmp_path), tmp_path / "every")
    assert [sorted(r.eval.get("global", {}))[:1] for r in every.records] == [[], ["cut_prompts"], ["cut_prompts"]]
    assert every.records[-1].eval["global"] == first.records[-1].eval["global"]


def read_back(table: dict[str, Any], folder: Path) -> Any:
    """The recipe through its own TOML, with a path that counts from the recipe's folder."""
    (folder / "problems.jsonl").write_bytes((SHARED / "gsm8k" / "test.jsonl").read_bytes())
    table["generation"]["file"] = "problems.jsonl"
    (folder / "r.toml").write_text(check(table, "r").to_toml())
    recipe = read_recipe(folder / "r.toml")
    assert recipe.generation is not None
    assert recipe.generation.file == str((folder / "problems.jsonl").resolve())
    return recipe


@pytest.mark.usefixtures("runnable")
@pytest.mark.shared
def test_a_run_with_programs(table: dict[str, Any], tmp_path: Path) -> None:
    table["federation"]["rounds"] = 1
    table["generation"] = {
        "task": "humaneval",
        "file": str(HUMANEVAL),
        "limit": 2,
        "max_new_tokens": 6,
        "run_programs": True,
        "samples": 2,
        "temperature": 0.5,
        "k": [1, 2],
    }
    scores = execute(check(table, "r"), tmp_path / "run").records[-1].eval["global"]
    assert scores["pass@1"] == scores["pass@2"] == 0.0
    assert {"stopped", "shut_in"} < set(scores)
    assert json.loads((tmp_path / "run" / "rounds.jsonl").read_text())["eval"]["global"] == scores


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "humaneval", "shots": 0}, "runs programs that a model wrote on this machine"),
        ({"task": "humaneval", "run_programs": True}, "has no meaning for humaneval"),
        ({"task": "mbpp", "run_programs": True, "k": [5]}, "asks for pass@5, but generation.samples = 1"),
        ({"k": [2]}, "are of humaneval and mbpp"),
        ({"run_programs": True}, "are of humaneval and mbpp"),
        ({"samples": 2}, "needs generation.temperature above 0"),
        ({"examples": "x.jsonl", "shots": 0}, "generation.shots = 0"),
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'?"),
        ({"task": "gsm9k"}, "'gsm8k', 'math', 'humaneval' or 'mbpp'"),
    ],
)
def test_generation_settings_that_cannot_hold_are_refused(
    change: dict[str, Any], words: str, table: dict[str, Any]
) -> None:
    changed = copy.deepcopy(table)
    changed["generation"] |= change
    with pytest.raises(RecipeError) as caught:
        check(changed, "r.toml")
    assert words in str(caught.value)


def test_generation_needs_a_model_that_writes(table: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="no model of its own"):
        check(table | {"strategy": {"name": "fedsa-lora"}}, "r")
    with pytest.raises(RecipeError, match="a classifier writes no text"):
        check(table | {"task": "sequence-classification", "data": {**table["data"], "label": "x"}}, "r")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file": "nowhere.jsonl"}, "does not exist"),
        ({"shots": 9000}, "has 7473 examples that are not asked"),
        ({"max_new_tokens": 600}, "the model's context has 512 tokens"),
    ],
)
def test_an_exam_that_cannot_be_set_is_explained(
    change: dict[str, Any], words: str, table: dict[str, Any], tmp_path: Path
) -> None:
    table["generation"] |= change
    with pytest.raises(InputError, match=words):
        execute(check(table, "r"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.shared
def test_programs_that_cannot_run_here_are_refused_before_training(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> Verdict:
        raise InputError("not here")

    monkeypatch.setattr("florana.train.exam.run_program", refuse)
    table["generation"] = {"task": "humaneval", "file": str(HUMANEVAL), "limit": 1, "max_new_tokens": 4}
    table["generation"]["run_programs"] = True
    with pytest.raises(InputError, match="not here"):
        execute(check(table, "r"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_verdicts_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Verdict(True, "passed").passed = False  # type: ignore[misc]
