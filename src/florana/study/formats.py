"""A study's tables as text: Markdown, LaTeX, CSV, and the cells that the screen and the page show."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from florana.study.estimates import Estimate
from florana.study.table import FIGURES, Comparison, Declared, Other, Row
from florana.study.tune import Tuning

HEADS = ["setting", "method", "global", "minus fedit", "p", "personal", "gap", "clients on common", "error, round 1",
         "error, mean", "optimum", "MB up", "MB down", "server s", "rounds to target", "seeds"]  # fmt: skip


def cells_of(row: Row, sign: str = "±") -> list[str]:
    """The row as text, in the order of HEADS."""
    seeds = f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else "")
    return [
        row.setting,
        row.method,
        *(_text(row.scores.get(figure), sign) for figure in ("global",)),
        _text(row.difference, sign, plus=True),
        "-" if row.p_value is None else f"{row.p_value:.3f}",
        *(_text(row.scores.get(figure), sign) for figure in ("personal", "gap", "clients_on_common")),
        *("-" if found is None else f"{found.mean:.4f}" for found in (row.first_error, row.error, row.optimum)),
        f"{row.bytes_up / 1e6:.2f}",
        f"{row.bytes_down / 1e6:.2f}",
        f"{row.server_seconds:.2f}",
        "-" if row.rounds_to_target is None else f"{row.rounds_to_target:.1f} ({row.reached}/{row.seeds})",
        seeds,
    ]


def _text(found: Estimate | None, sign: str, *, plus: bool = False) -> str:
    if found is None:
        return "-"
    mean = f"{found.mean:+.4f}" if plus else f"{found.mean:.4f}"
    if found.low is not None and found.high is not None:
        low, high = (f"{value:+.4f}" if plus else f"{value:.4f}" for value in (found.low, found.high))
        return f"{mean} ({low} to {high})"
    return mean if found.half is None else f"{mean} {sign} {found.half:.4f}"


OTHER_HEADS = ["setting", "method", "figure", "mean", "minus fedit", "p", "seeds"]


def other_cells(one: Other, sign: str = "±") -> list[str]:
    """The figure as text, in the order of OTHER_HEADS."""
    p_value = "-" if one.p_value is None else f"{one.p_value:.3f}"
    mean, difference = _text(one.value, sign), _text(one.difference, sign, plus=True)
    return [one.setting, one.method, one.figure, mean, difference, p_value, str(one.value.seeds)]


DECLARED_HEADS = ["setting", "declared comparison", "difference", "p", "p, Holm", "seeds"]


def declared_cells(one: Declared, sign: str = "±") -> list[str]:
    """The comparison as text, in the order of DECLARED_HEADS."""
    found = one.difference
    p_values = ["-" if p is None else f"{p:.2g}" for p in (one.p_value, one.adjusted)]
    seeds = "-" if found is None else str(found.seeds)
    return [one.setting, f"{one.first} minus {one.second}", _text(found, sign, plus=True), *p_values, seeds]


TUNED_HEADS = ["setting", "method", "chosen", "on validation rows, after rounds", "rounds trained"]


def tuned_cells(one: Tuning) -> list[str]:
    """What tuning tried and chose, in the order of TUNED_HEADS."""
    tried = [
        f"{_point(candidate.settings)}: "
        + (f"{candidate.figure:.4f}" if candidate.figure is not None else "failed")
        + f" ({candidate.rounds})"
        for candidate in one.candidates
    ]
    chosen = "nothing" if one.chosen is None else _point(one.chosen)
    return [one.setting, one.method, chosen, f"{one.by}: " + "; ".join(tried), str(one.rounds)]


def _point(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())


def markdown(comparison: Comparison, tried: Sequence[Tuning] = ()) -> str:
    """The tables as Markdown: methods, declared comparisons, other figures, what tuning chose."""
    tables = [_markdown(HEADS, [cells_of(row) for row in comparison.rows], 2)]
    if comparison.declared:
        tables.append(_markdown(DECLARED_HEADS, [declared_cells(one) for one in comparison.declared], 2))
    if comparison.others:
        tables.append(_markdown(OTHER_HEADS, [other_cells(one) for one in comparison.others], 3))
    if tried:
        tables.append(_markdown(TUNED_HEADS, [tuned_cells(one) for one in tried], 4))
    return "\n".join(tables)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * words + "---:|" * (len(heads) - words)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


def latex(comparison: Comparison) -> str:
    """The table as a LaTeX tabular (booktabs)."""

    def escaped(text: str) -> str:
        return text.replace("_", r"\_").replace("&", r"\&").replace("%", r"\%").replace("±", r"$\pm$")

    lines = [r"\begin{tabular}{ll" + "r" * (len(HEADS) - 2) + "}", r"\toprule"]
    lines.append(" & ".join(escaped(head) for head in HEADS) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(escaped(cell) for cell in cells_of(row)) + r" \\" for row in comparison.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line per row, every number on its own: means, half widths, seeds."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = ["setting", "method", "seeds", "failed"]
    figures = [*FIGURES, "difference", "first_error", "error", "optimum"]
    plain = ["p_value", "bytes_up", "bytes_down", "server_seconds", "rounds_to_target", "bytes_to_target", "reached"]
    writer.writerow([*names, *(f"{figure}{end}" for figure in figures for end in ("", "_half_width")), *plain])
    for row in comparison.rows:
        found = [row.scores.get(figure) if figure in FIGURES else getattr(row, figure) for figure in figures]
        numbers = [x for one in found for x in ((one.mean, one.half) if one else (None, None))]
        writer.writerow([*(getattr(row, name) for name in names), *numbers, *(getattr(row, name) for name in plain)])
    return out.getvalue()
