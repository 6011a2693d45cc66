"""florana's answer scorers beside lm-eval's own, on the same generated strings: every disagreement is printed.

    pip install lm-eval && python scripts/against_lm_eval.py ../shared/data

Needs lm-eval (0.4.13 was compared), which florana does not depend on: its scorers of HumanEval and MBPP fetch code
from the hub when they are imported, and run programs without barriers. Its GSM8K filters and metric and its MATH
normaliser work offline and are called here as its harness calls them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter

from florana.score import benchmarks

TASKS = Path(lm_eval.__file__).parent / "tasks"
PIECES = [
    "$",
    ",",
    ".",
    "-",
    " ",
    "#### ",
    "####",
    "\n",
    "7",
    "12",
    "1,000",
    "0.5",
    "3.",
    "x",
    "dollars",
    "%",
    "=",
    "#### $5",
]
LATEX = [
    "\\frac", "\\dfrac", "\\tfrac", "\\sqrt", "{", "}", "{1}", "{2}", "1", "2", "3", "x", "y", "=", " ", ".5", "0.5",
    "/", "\\left(", "\\right)", "^\\circ", "^{\\circ}", "\\%", "\\$", "\\text{ cm}", "\\text{A}", ",", "-", "\\!",
    "\n", "\\\\", "k = ",
]  # fmt: skip


def gsm8k_texts(rows: list[Any], rng: random.Random) -> Iterator[tuple[Any, str]]:
    """Solutions as they are, cut, with other endings, and with pieces put in anywhere."""
    for row in rows:
        text = row["answer"]
        yield row, text
        yield row, text.replace("####", rng.choice(["The answer is", "#### $", "#### -", "####", "### ", "so"]))
        place = rng.randrange(len(text))
        yield row, text[:place]
        yield row, text[:place] + rng.choice(PIECES) + text[place:]
        yield row, text + rng.choice(PIECES) + rng.choice(PIECES)
        yield row, "".join(rng.choice(PIECES) for _ in range(rng.randrange(8)))


def their_gsm8k() -> Callable[[Any, str], tuple[bool, bool]]:
    """lm-eval's strict and flexible match, put together from its own task file."""
    config = yaml.safe_load((TASKS / "gsm8k" / "gsm8k.yaml").read_text())
    metric = config["metric_list"][0]
    filters = []
    for chain in config["filter_list"]:
        first = dict(chain["filter"][0])
        assert first.pop("function") == "regex"
        filters.append(RegexFilter(**first))

    def score(row: Any, text: str) -> tuple[bool, bool]:
        found = [one.apply([[text]], [row])[0][0] for one in filters]
        strict, flexible = (
            bool(
                exact_match_hf_evaluate(
                    predictions=[answer],
                    references=[row["answer"]],
                    regexes_to_ignore=metric["regexes_to_ignore"],
                    ignore_case=metric["ignore_case"],
                    ignore_punctuation=metric["ignore_punctuation"],
                )["exact_match"]
            )
            for answer in found
        )
        return strict, flexible

    return score


def raises(normalise: Callable[[str], str], *texts: str) -> bool:
    """Whether a normaliser fails on one of the texts."""
    try:
        for text in texts:
            normalise(text)
    except Exception:
        return True
    return False


def main(data: Path) -> None:
    """Print the counts, and up to twenty disagreements of each kind."""
    print("lm-eval", importlib.metadata.version("lm-eval"))
    rng = random.Random(0)
    score, count, apart = their_gsm8k(), 0, []
    for row, text in gsm8k_texts(benchmarks.read_problems("gsm8k", data / "gsm8k" / "test.jsonl"), rng):
        ours = benchmarks.figures("gsm8k", [row], [[text]])
        theirs = score(row, text)
        count += 1
        if (bool(ours["exact_match"]), bool(ours["exact_match_flexible"])) != theirs:
            apart.append((text[-60:], row["answer"][-20:], ours, theirs))
    print(f"gsm8k: {count} strings, {len(apart)} apart", *apart[:20], sep="\n")

    spec = importlib.util.spec_from_file_location("theirs", TASKS / "hendrycks_math" / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    theirs_math = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs_math)
    answers = ["".join(rng.choice(LATEX) for _ in range(rng.randrange(1, 6))) for _ in range(20000)]
    count, raised, apart = 0, 0, []
    for left in answers:
        right = rng.choice(
            [rng.choice(answers), left.replace("dfrac", "frac"), left + " ", left.replace("\\frac", "\\tfrac")]
        )
        gold = f"so $\\boxed{{{right}}}$"
        if left.count("$") or right.count("{") != right.count("}") or right.startswith(" ") or not left.strip():
            continue
        row = {"problem": "?", "solution": gold}
        ours = bool(benchmarks.figures("math", [row], [[left]])["exact_match"])
        theirs = bool(theirs_math.process_results(row, [left])["exact_match"])
        count += 1
        if ours != theirs and raises(theirs_math.strip_string, left, right):
            raised += 1  # lm-eval then compares the strings as they are; the paper's own code lets `x/y` through
        elif ours != theirs:
            apart.append((left, right, ours, theirs))
    print(
        f"math: {count} pairs, {len(apart)} apart, and {raised} that lm-eval's normaliser cannot read",
        *apart[:20],
        sep="\n",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
