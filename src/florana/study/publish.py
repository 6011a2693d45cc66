"""What a study leaves to read: tables (Markdown, CSV, LaTeX, JSON), the page, and the fixed-updates ablation's
summary."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from florana.atomic_files import explained, replace_file
from florana.bounded import json_of
from florana.federation.best import LOWER_IS_BETTER
from florana.report.comparison import Further, Series, write_comparison
from florana.study.estimates import estimate, paired
from florana.study.formats import (
    DECLARED_HEADS,
    HEADS,
    OTHER_HEADS,
    TUNED_HEADS,
    as_csv,
    cells_of,
    declared_cells,
    latex,
    markdown,
    other_cells,
    tuned_cells,
)
from florana.study.grid import Plan
from florana.study.runner import swap_file
from florana.study.table import Comparison, compare
from florana.study.tune import Tuning


def publish(
    plan: Plan, out: Path, failures: Mapping[str, str], tried: Sequence[Tuning] = ()
) -> tuple[Comparison, dict[str, Any], Path]:
    """Write every file of the study; returns the comparison, the fixed-updates ablation's summary, and the page.

    Args:
        plan: the study.
        out: its folder.
        failures: cell id -> why it failed.
        tried: what tuning found, where there was any.
    """
    comparison = compare(plan, out)
    rows = swap_rows(plan, out)
    swapped = summarise(rows, comparison.metric)
    seeds = len({setting.seed for setting in plan.settings})
    with explained(out, "the study's tables could not be written"):
        replace_file(out / "table.md", markdown(comparison, tried).encode())
        replace_file(out / "table.csv", as_csv(comparison).encode())
        replace_file(out / "table.tex", latex(comparison).encode())
        content = {**comparison.to_json(), "swap": swapped, "swap_rows": rows, "failures": dict(failures)}
        content |= {"tuning": [asdict(one) for one in tried]}
        replace_file(out / "study.json", (json.dumps(content, indent=1) + "\n").encode())
    page = write_comparison(
        out / "report.html",
        title=plan.base.title or "florana compare",
        summary=f"{len(plan.methods)} methods, {seeds} seeds, {plan.base.federation.rounds} rounds. "
        f"Score: {comparison.metric} on the common test set. " + " ".join(swapped["text"]),
        heads=HEADS,
        rows=[cells_of(row) for row in comparison.rows],
        tables=[
            Further(
                "The declared comparisons",
                DECLARED_HEADS,
                [declared_cells(one) for one in comparison.declared],
                "Paired by seed, with 95 % intervals; p, Holm: corrected over all of these comparisons together.",
                2,
            ),
            Further("Other figures of the global models", OTHER_HEADS, [other_cells(o) for o in comparison.others]),
            Further(
                "What was tuned",
                TUNED_HEADS,
                [tuned_cells(one) for one in tried],
                "Chosen on the validation rows, on seeds that are not scored, by successive halving: in brackets the "
                "rounds a candidate was trained. The test set was not read.",
                4,
            ),
        ],
        rates="Each method's settings were tuned alike (the last table)."
        if tried
        else "All methods use the recipe's learning rate: those that train one factor may want another.",
        series=[Series(row.setting, row.method, row.points) for row in comparison.rows],
        swapped=_swap_series(rows, comparison.metric),
        metric=comparison.metric,
        failures=failures,
    )
    return comparison, swapped, page


def swap_rows(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """The rows of every fixed-updates ablation that is there, with their setting and seed."""
    found = []
    for setting in plan.settings:
        path = swap_file(out, setting)
        if path.exists():
            for row in json_of(path.read_bytes())["rows"]:
                found.append({"setting": setting.name, "seed": setting.seed, **row})
    return found


def summarise(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Per setting, round and method: error, score, and the score's difference from FedIT's merge, over seeds; and the
    rank correlation of error and score over methods, one per seed and round, averaged with its interval. Where each
    rule went on from its merge, the same of the scores that it came to (`when` says which)."""
    found = _summarised(rows, metric, "")
    on = [{**row, **row["on"]} for row in rows if "on" in row]
    then = _summarised(on, metric, "gone on")
    return {key: found[key] + then[key] for key in found}


def _summarised(rows: Sequence[Mapping[str, Any]], metric: str, when: str) -> dict[str, list[Any]]:
    table, correlations, text = [], [], []
    for setting, round_ in dict.fromkeys((row["setting"], row["round"]) for row in rows):
        own = [row for row in rows if (row["setting"], row["round"]) == (setting, round_)]
        reference = {row["seed"]: row[metric] for row in own if row["method"] == "fedit"}
        for method in dict.fromkeys(row["method"] for row in own):
            mine = [row for row in own if row["method"] == method]
            difference, p_value = paired({row["seed"]: row[metric] for row in mine}, reference)
            score, error = estimate([row[metric] for row in mine]), estimate([row["error"] for row in mine])
            table.append(
                {
                    "setting": setting,
                    "round": round_,
                    "method": method,
                    "when": when,
                    "error": error.mean if error else None,
                    "score": score.mean if score else None,
                    "half_width": score.half if score else None,
                    "minus_fedit": difference.mean if difference else None,
                    "minus_fedit_half_width": difference.half if difference else None,
                    "p": p_value,
                }
            )
        values = []
        for seed in dict.fromkeys(row["seed"] for row in own):
            pairs = [(row["error"], row[metric]) for row in own if row["seed"] == seed]
            values.append(rank_correlation(pairs, metric))
        found = estimate(values)
        if found is not None:
            one = {"setting": setting, "round": round_, "when": when, "mean": found.mean, "half_width": found.half}
            correlations.append(one)
            width = f" ± {found.half:.2f}" if found.half is not None else ""
            still = len(values) - found.seeds
            text.append(
                f"Fixed-updates ablation, {setting}, round {round_}{', gone on from there' if when else ''}: "
                "rank correlation of lower error and "
                f"better {metric} over rules {found.mean:+.2f}{width} over {found.seeds} seeds"
                + (f" (in {still} more, no rule changed the score)." if still else ".")
            )
    return {"table": table, "correlations": correlations, "text": text}


EXACT = 1e-5
"""Errors below this are rounding in float32: the rules that have them are tied, not ranked by their noise."""


def rank_correlation(pairs: Sequence[tuple[float, float]], metric: str) -> float | None:
    """Spearman's of (error, score), signed so that +1 means: the lower the error, the better the score.

    None where errors or scores do not vary, or where there are fewer than three pairs.

    Examples:
        >>> rank_correlation([(0.4, 0.5), (0.3, 0.6), (0.1, 0.9)], "accuracy").__round__(6)
        1.0
    """
    errors, scores = np.array(pairs, dtype=float).T
    errors = np.where(errors < EXACT, 0.0, errors)
    if len(pairs) < 3 or np.ptp(errors) == 0 or np.ptp(scores) == 0:
        return None
    value = float(stats.spearmanr(errors, scores).statistic)
    value = value if metric in LOWER_IS_BETTER else -value
    return value if math.isfinite(value) else None


def _swap_series(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Series]:
    keys = dict.fromkeys((row["setting"], row["round"], row["method"]) for row in rows)
    return [
        Series(
            f"{setting}, round {round_}",
            method,
            [
                {"seed": float(row["seed"]), "score": row[metric], "error": row["error"]}
                for row in rows
                if (row["setting"], row["round"], row["method"]) == (setting, round_, method)
            ],
        )
        for setting, round_, method in keys
    ]
