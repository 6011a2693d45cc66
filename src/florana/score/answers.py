"""Final answers: taken out of a solution, brought to one spelling, compared. GSM8K and MATH, as the field does it."""

from __future__ import annotations

import re

from florana.score.latex import normal

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_DOLLARS = re.compile(r"\$(.*)\$", re.DOTALL)


def marked_number(text: str) -> str | None:
    """The first number after `#### `, the end that GSM8K's own solutions have; None where there is none.

    The strict extraction of lm-eval's `gsm8k` (the pattern `#### (-?[0-9.,]+)`).

    Examples:
        >>> marked_number("She sold 24 + 48 = 72 clips.\\n#### 72")
        '72'
    """
    found = _STRICT.search(text)
    return found[1] if found else None


def last_number(text: str) -> str | None:
    """The last number anywhere in the text, with the signs that belong to it; None where there is none.

    The flexible extraction of lm-eval's `gsm8k`. It can take a lone `..` for a number, as lm-eval does: such an
    answer is wrong either way.

    Examples:
        >>> last_number("so it is $1,450.50 in all.")
        '$1,450.50'
    """
    found = _FLEXIBLE.findall(text)
    return found[-1] if found else None


def plain_number(text: str) -> str:
    """A number without thousands separators, dollar signs and a trailing full stop; nothing else is changed.

    GSM8K's gold answers are compared as strings: `2` and `2.0` differ, in lm-eval too.

    Examples:
        >>> plain_number("$1,450."), plain_number("-3.5")
        ('1450', '-3.5')
    """
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text))


def same_number(answer: str | None, solution: str) -> bool:
    """Whether an extracted answer is the one after the last `#### ` of a GSM8K solution.

    Raises:
        ValueError: the solution has no `#### `.

    Examples:
        >>> same_number("1,450", "... #### 1450"), same_number(None, "... #### 1450")
        (True, False)
    """
    _, mark, gold = solution.rpartition("#### ")
    if not mark:
        raise ValueError("the solution has no '#### ' before its answer")
    return answer is not None and plain_number(answer) == plain_number(gold.strip())


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` (or `\fbox{...}`, `\boxed x`), braces balanced; None without one.

    Where Hendrycks et al. (arXiv 2103.03874) put a MATH solution's answer.

    Examples:
        >>> boxed(r"so $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed")
    command = "\\boxed" if start >= 0 else "\\fbox"
    start = start if start >= 0 else text.rfind(command)
    if start < 0:
        return None
    rest = text[start + len(command) :]
    if rest.startswith(" "):
        return rest[1:].split("$")[0] or None
    depth = 0
    for position, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:position] if position else None
    return None  # never closed: the answer was cut off


def written_answer(text: str) -> str | None:
    r"""The answer of a model's MATH solution: the last box; else what is between the first and the last `$`; else all.

    lm-eval's `hendrycks_math` has the last two only; models that were shown worked solutions write the box. None for an
    empty text or an unfinished box.

    Examples:
        >>> written_answer(r"... = \boxed{7}"), written_answer("it is $x^2$."), written_answer(" 12")
        ('7', 'x^2', '12')
    """
    if "\\boxed" in text or "\\fbox" in text:
        return boxed(text)
    between = _DOLLARS.search(text)
    return (between[1] if between else text).lstrip() or None


def same_expression(answer: str | None, gold: str | None) -> bool:
    r"""Whether two MATH answers are one string after normalisation (`latex.normal`). A missing answer equals nothing.

    Examples:
        >>> same_expression(r"\dfrac12", r"\frac{1}{2}"), same_expression("3", None)
        (True, False)
    """
    return answer is not None and gold is not None and normal(answer) == normal(gold)
