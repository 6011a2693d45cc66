"""HumanEval and MBPP: completions cut where the field cuts them, programs and their tests put together, pass@k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function's body has ended (Chen et al., arXiv 2107.03374, section 3.1; lm-eval has the same)."""

MBPP_STOPS = ("[DONE]",)
"""The mark after each program in the prompt of Austin et al. (arXiv 2108.07732)."""


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop sequences, or all of it.

    Examples:
        >>> cut_at("    return 1\\n\\ndef other(): ...", HUMANEVAL_STOPS)
        '    return 1\\n'
    """
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def humaneval_program(row: Mapping[str, Any], completion: str) -> tuple[str, str]:
    """(program, tests): the prompt with its completion; the row's test, called on the function asked for.

    Examples:
        >>> row = {"prompt": "def f():\\n", "test": "def check(g): ...", "entry_point": "f"}
        >>> humaneval_program(row, "    return 1")
        ('def f():\\n    return 1\\n', 'def check(g): ...\\ncheck(f)\\n')
    """
    return f"{row['prompt']}{completion}\n", f"{row['test']}\ncheck({row['entry_point']})\n"


def mbpp_program(row: Mapping[str, Any], completion: str) -> tuple[str, str]:
    """(program, tests): the completion as it is; imports and setup of the tests (which may use it), then the asserts.

    Examples:
        >>> mbpp_program({"test_list": ["assert f() == 1"]}, "def f(): return 1")
        ('def f(): return 1\\n', 'assert f() == 1\\n')
    """
    before = [*row.get("test_imports", ()), row.get("test_setup_code") or ""]
    return f"{completion}\n", "\n".join([*filter(None, before), *row["test_list"]]) + "\n"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples, drawn without putting back from those of a problem, passes.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. (arXiv 2107.03374, equation 1).

    Raises:
        ValueError: not 0 <= passed <= samples and 1 <= k <= samples.

    Examples:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
        (0.25, 0.5, 1.0)
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {passed} of them passed")
    return 1 - comb(samples - passed, k) / comb(samples, k)
