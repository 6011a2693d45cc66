"""Answers are found and compared, and pass@k counted, as the field does it; gold answers score, broken ones do not."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from florana.errors import InputError
from florana.score import benchmarks
from florana.score.answers import (
    boxed,
    last_number,
    marked_number,
    same_expression,
    same_number,
    written_answer,
)
from florana.score.code_tasks import HUMANEVAL_STOPS, cut_at, humaneval_program, pass_at_k
from florana.score.latex import normal
from florana.score.programs import run_program
from tests.conftest import SHARED
from tests.score_cases import MBPP

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.shared
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_gold_answer_of_gsm8k_is_extracted_and_no_corrupted_one(split: str, count: int) -> None:
    rows = benchmarks.read_problems("gsm8k", SHARED / "gsm8k" / f"{split}.jsonl")
    right = benchmarks.figures("gsm8k", rows, [[row["answer"]] for row in rows])
    assert len(rows) == count
    assert right == {"exact_match": 1.0, "exact_match_flexible": 1.0, "unparsed": 0.0}
    if split == "train":
        return
    wrong = benchmarks.figures("gsm8k", rows, [[row["answer"] + "1"] for row in rows])
    assert wrong == {"exact_match": 0.0, "exact_match_flexible": 0.0, "unparsed": 0.0}
    none = benchmarks.figures("gsm8k", rows, [[row["answer"].split("####")[0]] for row in rows])
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
    assert benchmarks.figures("math", rows, texts) == {"exact_match": 0.75, "unparsed": 0.25}
    assert written_answer("") is None


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 3, 4), (4, 4, 2), (7, 1, 7)])
def test_pass_at_k_is_the_mean_over_all_draws(samples: int, passed: int, k: int) -> None:
    marks = [1] * passed + [0] * (samples - passed)
    brute = statistics.mean(any(draw) for draw in itertools.combinations(marks, k))
    assert pass_at_k(samples, passed, k) == pytest.approx(brute)


@pytest.mark.usefixtures("runnable")
def test_pass_at_k_of_several_problems_counts_each_problem_once() -> None:
    row = {"prompt": "def f():\n", "test": "def check(g):\n    assert g() == 1", "entry_point": "f"}
    texts = [["    return 1", "    return 2"], ["    return 2", "    return 2"]]
    scores = benchmarks.figures("humaneval", [row, row], texts, ks=(1, 2), workers=2)
    assert (scores["pass@1"], scores["pass@2"]) == (0.25, 0.5)
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at_k(2, 1, 3)


@pytest.mark.usefixtures("runnable")
def test_completions_are_cut_at_the_first_stop() -> None:
    row = {"prompt": "def f():\n", "test": "def check(g):\n    assert g() == 1", "entry_point": "f"}
    text = "    return 1\n\nprint(f())\n\ndef other(:"
    assert cut_at(text, HUMANEVAL_STOPS) == "    return 1\n"
    assert not run_program(*humaneval_program(row, text)).passed
    assert benchmarks.figures("humaneval", [row], [[text]])["pass@1"] == 1.0
    assert cut_at("a b", ("c",)) == "a b"


@pytest.mark.shared
def test_prompts_are_those_of_lm_eval() -> None:
    shots = benchmarks.read_examples("mbpp", MBPP)
    rows = benchmarks.read_problems("mbpp", MBPP)
    assert [row["task_id"] for row in rows] == list(range(11, 511))
    assert [row["task_id"] for row in shots] == list(range(2, 11))
    text = benchmarks.prompt("mbpp", rows[0], shots[:1])
    assert text.startswith("You are an expert Python programmer, and here is your task: Write a function to find the ")
    assert text.count("[BEGIN]\n") == 2
    assert text.count("\n[DONE]\n\nYou are") == 1
    assert text.endswith(f"{rows[0]['test_list'][2]}\n[BEGIN]\n")
    gsm = {"question": "2 + 2?", "answer": "#### 4"}
    assert benchmarks.prompt("gsm8k", gsm, [gsm]) == "Question: 2 + 2?\nAnswer: #### 4\n\nQuestion: 2 + 2?\nAnswer:"
    assert benchmarks.prompt("gsm8k", gsm, template="{question}") == "2 + 2?"
    with pytest.raises(InputError, match=r"generation\.prompt cannot be filled"):
        benchmarks.prompt("gsm8k", gsm, template="{query}")


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
        benchmarks.read_problems(task, path)
    assert words in str(caught.value)
