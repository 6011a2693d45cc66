r"""One spelling for the answers of MATH: the normaliser of Hendrycks et al. (arXiv 2103.03874), written anew.

The rules, in their order, are those of the paper's released `math_equivalence`, so that figures can be compared with
the field's: it is a comparison of strings, not algebra (`x+1` and `1+x` differ).
"""

from __future__ import annotations

import re

_REMOVED = ("\n", "\\!")
_RENAMED = (("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_DROPPED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")
_RATIO = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")


def normal(answer: str) -> str:
    r"""The answer in one spelling.

    Line breaks, `\!`, `\left`, `\right`, degrees, dollar and percent signs and spaces go; `\dfrac` and `\tfrac` become
    `\frac`; a unit (`\text{ ...}` at the end) goes; `.5` becomes `0.5`; `x = ` at the beginning goes; `\sqrt3`,
    `\frac12` get their braces; `a/b` of two integers becomes `\frac{a}{b}`, and `0.5` becomes `\frac{1}{2}`. An answer
    that the rules cannot read stays as it is.

    Examples:
        >>> normal(r"x = \dfrac12 \text{ cm}"), normal("50\\%"), normal("3/4"), normal(r"\sqrt3")
        ('\\frac{1}{2}', '50', '\\frac{3}{4}', '\\sqrt{3}')
    """
    text = answer
    for part in _REMOVED:
        text = text.replace(part, "")
    for old, new in _RENAMED:
        text = text.replace(old, new)
    for part in _DROPPED:
        text = text.replace(part, "")
    pieces = text.split("\\text{ ")
    if len(pieces) > 2:
        return answer  # two units: no rule of the paper reads it
    text = pieces[0].replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text.startswith(".") else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    braced = _brace_roots(text)
    if braced is None:
        return answer
    braced = _brace_fractions(braced.replace(" ", ""))
    if braced is None:
        return answer
    if braced == "0.5":
        return "\\frac{1}{2}"
    ratio = _RATIO.fullmatch(braced)
    return f"\\frac{{{ratio[1]}}}{{{ratio[2]}}}" if ratio and "-0" not in ratio.groups() else braced


def _brace_roots(text: str) -> str | None:
    r"""`\sqrt3` -> `\sqrt{3}`; None where a root has no argument."""
    first, *rest = text.split("\\sqrt")
    if any(not part for part in rest):
        return None
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _brace_fractions(text: str) -> str | None:
    r"""`\frac12` and `\frac1{72}` -> with both braces; a fraction of one sign alone leaves the whole as it is."""
    first, *rest = text.split("\\frac")
    result = first
    for part in rest:
        if not part:
            return None
        if part[0] == "{":
            result += "\\frac" + part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            result += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            result += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return result
