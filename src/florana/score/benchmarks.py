"""The tasks that are scored on what a model writes: their files, prompts, ends of an answer, and figures.

Prompts and stop sequences are those of lm-eval 0.4.13 (`gsm8k`, `hendrycks_math`, `humaneval`, `mbpp`), so that figures
can be laid beside published ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from florana import bounded
from florana.errors import InputError, nearest
from florana.score import answers, code_tasks
from florana.score.programs import STANDARD, Limits, Verdict, run_programs
from florana.score.sandbox import BARRIERS

TaskName = Literal["gsm8k", "math", "humaneval", "mbpp"]

Row = Mapping[str, Any]
"""One problem, as its file has it."""


@dataclass(frozen=True)
class Task:
    """How one task asks and where an answer ends.

    Args:
        columns: those a row must have.
        template: the prompt, with columns in braces.
        stops: sequences that end an answer.
        solution: row -> what follows a prompt that is shown as an example.
        program: (row, completion) -> (program, tests), where answers are programs.
    """

    columns: tuple[str, ...]
    template: str
    stops: tuple[str, ...]
    solution: Callable[[Row], str]
    program: Callable[[Row, str], tuple[str, str]] | None = None


TASKS: Mapping[str, Task] = {
    "gsm8k": Task(
        ("question", "answer"),
        "Question: {question}\nAnswer:",
        ("Question:", "</s>", "<|im_end|>"),
        lambda row: f" {row['answer']}",
    ),
    "math": Task(
        ("problem", "solution"), "Problem: {problem}\nAnswer:", ("Problem:",), lambda row: f" {row['solution']}"
    ),
    "humaneval": Task(
        ("prompt", "test", "entry_point"),
        "{prompt}",
        code_tasks.HUMANEVAL_STOPS,
        lambda row: str(row["canonical_solution"]),
        code_tasks.humaneval_program,
    ),
    "mbpp": Task(
        ("text", "code", "test_list"),
        "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
        "{tests}\n[BEGIN]\n",
        code_tasks.MBPP_STOPS,
        lambda row: f"{row['code']}\n[DONE]",
        code_tasks.mbpp_program,
    ),
}

PROBLEM_BYTES = 2**27
"""Of a file of problems, unpacked: MATH has 10 million."""

MBPP_TEST, MBPP_SHOTS = range(11, 511), range(2, 11)
"""The task ids that Austin et al. set apart for testing, and those for the prompt as far as lm-eval takes them from."""


def read_problems(name: str, path: Path) -> list[Row]:
    """The rows of a task's file (jsonl, json, either gzipped), checked. MBPP with its ids gives its test split only.

    Raises:
        InputError: the file is not there or not JSON, a row lacks a column, or has no answer to compare with.
    """
    rows = read_all(name, path)
    if name == "mbpp" and any(row.get("task_id") in MBPP_SHOTS for row in rows):
        return [row for row in rows if row.get("task_id") in MBPP_TEST]
    return rows


def read_examples(name: str, path: Path) -> list[Row]:
    """The rows that may be shown in a prompt: all of a training file; of MBPP with its ids, those set apart for it."""
    rows = read_all(name, path)
    return [row for row in rows if name != "mbpp" or row.get("task_id") in MBPP_SHOTS]


def prompt(name: str, row: Row, examples: Sequence[Row] = (), template: str | None = None) -> str:
    """A row's prompt, after worked examples with their solutions where any are given.

    Raises:
        InputError: the template names a column that the row does not have.

    Examples:
        >>> prompt("gsm8k", {"question": "2 + 2?"}, [{"question": "1 + 1?", "answer": "#### 2"}])
        'Question: 1 + 1?\\nAnswer: #### 2\\n\\nQuestion: 2 + 2?\\nAnswer:'
    """
    shown = (f"{_asked(name, one, template)}{TASKS[name].solution(one)}\n\n" for one in examples)
    return "".join(shown) + _asked(name, row, template)


def turns(name: str, row: Row, examples: Sequence[Row] = (), template: str | None = None) -> list[dict[str, str]]:
    """The same as turns of a chat, one per question and per worked solution: lm-eval's messages of that task.

    Raises:
        InputError: as `prompt`.

    Examples:
        >>> turns("gsm8k", {"question": "2 + 2?"}, [{"question": "1 + 1?", "answer": "#### 2"}])[1]
        {'role': 'assistant', 'content': '#### 2'}
    """
    said = []
    for one in examples:
        said.append({"role": "user", "content": _asked(name, one, template)})
        said.append({"role": "assistant", "content": TASKS[name].solution(one).removeprefix(" ")})
    return [*said, {"role": "user", "content": _asked(name, row, template)}]


def _asked(name: str, row: Row, template: str | None) -> str:
    try:
        return (template or TASKS[name].template).format_map(row)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"generation.prompt cannot be filled: {error}",
            fix=f"columns in braces, of {', '.join(sorted(row))}; a brace itself is doubled",
        ) from None


def figures(
    name: str,
    rows: Sequence[Row],
    completions: Sequence[Sequence[str]],
    *,
    ks: Sequence[int] = (1,),
    limits: Limits = STANDARD,
    workers: int | None = None,
) -> dict[str, float]:
    """The scores of what a model wrote: one or more completions per row; means over rows.

    `exact_match` (GSM8K: the number after `####`; `exact_match_flexible`: the last number anywhere) and `unparsed`, the
    share of completions without an answer where one was looked for. `pass@k`, the share of programs `stopped` by a
    limit, and `shut_in`, the share that ran behind every barrier of the kernel (`programs`).

    Raises:
        InputError: programs cannot be run here.

    Examples:
        >>> figures("gsm8k", [{"answer": "#### 5"}], [["2 + 3 = 5\\n#### 5"]])
        {'exact_match': 1.0, 'exact_match_flexible': 1.0, 'unparsed': 0.0}
    """
    return figures_of(verdicts(name, rows, completions, limits=limits, workers=workers), ks)


Mark = Mapping[str, float] | Verdict
"""What is said of one completion: its figures, or how its program did."""


def verdicts(
    name: str,
    rows: Sequence[Row],
    completions: Sequence[Sequence[str]],
    *,
    limits: Limits = STANDARD,
    workers: int | None = None,
) -> list[list[Mark]]:
    """Every completion judged by itself, row by row; arguments and errors as of `figures`."""
    task = TASKS[name]
    cut = [[code_tasks.cut_at(text, task.stops) for text in texts] for texts in completions]
    if task.program is None:
        return [[_marks(name, row, text) for text in texts] for row, texts in zip(rows, cut, strict=True)]
    pairs = [task.program(row, text) for row, texts in zip(rows, cut, strict=True) for text in texts]
    judged = iter(run_programs(pairs, limits, workers=workers))
    return [[next(judged) for _ in texts] for texts in cut]


def figures_of(marks: Sequence[Sequence[Mark]], ks: Sequence[int] = (1,)) -> dict[str, float]:
    """The scores that `figures` gives, from the verdicts."""
    programs = [mark for texts in marks for mark in texts if isinstance(mark, Verdict)]
    if programs:
        return _code_figures(programs, [len(texts) for texts in marks], ks)
    plain = [[mark for mark in texts if isinstance(mark, Mapping)] for texts in marks]
    return {figure: _mean(_mean(one[figure] for one in texts) for texts in plain) for figure in plain[0][0]}


def figure_names(name: str, ks: Sequence[int] = (1,)) -> tuple[str, ...]:
    """The names that `figures` gives for a task.

    Examples:
        >>> figure_names("mbpp", [1, 10])
        ('pass@1', 'pass@10', 'stopped', 'shut_in')
    """
    if TASKS[name].program is not None:
        return (*(f"pass@{k}" for k in ks), "stopped", "shut_in")
    return tuple(_marks(name, {"answer": "#### 0", "solution": ""}, ""))


def _marks(name: str, row: Row, text: str) -> dict[str, float]:
    if name == "gsm8k":
        strict, flexible = answers.marked_number(text), answers.last_number(text)
        return {
            "exact_match": float(answers.same_number(strict, row["answer"])),
            "exact_match_flexible": float(answers.same_number(flexible, row["answer"])),
            "unparsed": float(strict is None),
        }
    answer = answers.written_answer(text)
    return {"exact_match": float(answers.same_expression(answer, gold(row))), "unparsed": float(answer is None)}


def gold(row: Row) -> str | None:
    r"""The answer of a MATH row: its `answer` where it has one, as MATH-500 does, else the last box of its solution.

    Examples:
        >>> gold({"solution": r"so it is $\boxed{7}$."})
        '7'
    """
    given = row.get("answer")
    return str(given) if given is not None else answers.boxed(row["solution"])


def _code_figures(verdicts: Sequence[Verdict], counts: Sequence[int], ks: Sequence[int]) -> dict[str, float]:
    passed, start = [], 0
    for count in counts:
        passed.append(sum(verdict.passed for verdict in verdicts[start : start + count]))
        start += count
    scores = {
        f"pass@{k}": _mean(code_tasks.pass_at_k(n, c, k) for n, c in zip(counts, passed, strict=True)) for k in ks
    }
    stopped = _mean(verdict.reason in ("timeout", "memory", "files") for verdict in verdicts)
    return scores | {"stopped": stopped, "shut_in": _mean(set(v.barriers) == set(BARRIERS) for v in verdicts)}


def _mean(values: Iterable[float]) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


def read_all(name: str, path: Path) -> list[Row]:
    """Every row of a task's file, checked. Raises InputError."""
    try:
        data = bounded.read_bytes(path, PROBLEM_BYTES)
        text = (bounded.unpacked(data, PROBLEM_BYTES) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"the file of problems {path} does not exist", fix="relative paths count from the recipe's folder"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} cannot be read", why=str(error).splitlines()[0]) from None
    try:
        whole = text.lstrip().startswith("[")
        rows = bounded.json_of(text) if whole else [bounded.json_of(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is neither JSON nor JSON lines", why=str(error)) from None
    if not rows:
        raise InputError(f"{path} holds no rows")
    return [_checked(name, row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _checked(name: str, given: Any, place: str) -> Row:
    if not isinstance(given, dict):
        raise InputError(f"{place} is no JSON object")
    row: dict[str, Any] = given
    if name == "mbpp" and "prompt" in row:  # the sanitized edition's name for it
        row = {"text": row["prompt"], **row}
    for column in TASKS[name].columns:
        if row.get(column) is None:
            raise InputError(f"{place} has no '{column}', which {name} needs", fix=nearest(column, map(str, row)))
    if name == "mbpp":
        if not isinstance(row["test_list"], list):
            raise InputError(f"{place}: 'test_list' is no list of tests")
        row = {**row, "tests": "\n".join(map(str, row["test_list"]))}
    if name == "gsm8k" and "#### " not in str(row["answer"]):
        raise InputError(f"{place}: the answer has no '#### ' before its number")
    if name == "math" and gold(row) is None:
        raise InputError(f"{place}: the solution has no \\boxed{{...}} answer, and there is no 'answer'")
    return row
