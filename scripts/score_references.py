"""The scorers on all reference solutions and on broken ones: 100 % and 0 %, with what each file holds.

    python scripts/score_references.py ../shared/data

About two minutes on two cores: some three thousand programs are run.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from florana.score import benchmarks
from florana.score.code_tasks import humaneval_program, mbpp_program
from florana.score.programs import run_programs

WRONG = {"return None": "return None", "a syntax error": "return (", "exit(0)": "raise SystemExit(0)"}


def main(data: Path) -> None:
    """Print one line per task and kind of solution."""
    humaneval = benchmarks.read_problems("humaneval", data / "humaneval" / "HumanEval.jsonl.gz")
    mbpp = benchmarks.read_all("mbpp", data / "mbpp" / "mbpp.jsonl")
    kinds = {
        "humaneval, reference": [humaneval_program(row, row["canonical_solution"]) for row in humaneval],
        "mbpp, reference": [mbpp_program(row, row["code"]) for row in mbpp],
    }
    for name, body in WRONG.items():
        kinds[f"humaneval, {name}"] = [humaneval_program(row, f"    {body}\n") for row in humaneval]
    kinds["mbpp, functions renamed"] = [
        mbpp_program(row, re.sub(r"def (\w+)", r"def \1_", row["code"])) for row in mbpp
    ]
    for name, pairs in kinds.items():
        started = time.perf_counter()
        verdicts = run_programs(pairs)
        passed = sum(verdict.passed for verdict in verdicts)
        print(f"{name}: {passed} of {len(verdicts)} passed, {time.perf_counter() - started:.0f} s")
    for split in ("train", "test"):
        rows = benchmarks.read_problems("gsm8k", data / "gsm8k" / f"{split}.jsonl")
        print(f"gsm8k {split}, {len(rows)} gold:", benchmarks.figures("gsm8k", rows, [[row["answer"]] for row in rows]))
        wrong = benchmarks.figures("gsm8k", rows, [[row["answer"] + "1"] for row in rows])
        print(f"gsm8k {split}, corrupted:", wrong)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
