"""The tables of docs/study.md, from the figures under docs/study/.

    python scripts/study_table.py [--check]

Between `<!-- study: NAME KIND -->` and `<!-- end of study -->` stands what docs/study/NAME.json says: its methods
(`rows`), its declared comparisons (`declared`), or momentum beside FedIT at rounds after the last (`later`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from generated import settle

from florana.study.estimates import Estimate, estimate

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"(<!-- study: (\S+) (\S+) -->\n).*?(<!-- end of study -->)", re.DOTALL)


def told(found: Mapping[str, Any] | Estimate | None, sign: str = "") -> str:
    """Mean and half of the 95 % interval."""
    if found is None:
        return ""
    mean, half = (found.mean, found.half) if isinstance(found, Estimate) else (found["mean"], found["half"])
    return f"{mean:{sign}.3f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.3f}"


def short(method: str) -> str:
    """A method by its name and what its options are set to.

    Examples:
        >>> short("best-rank[factorization=balanced, server.optimizer=momentum]")
        'best-rank, balanced, momentum'
    """
    name, _, options = method.rstrip("]").partition("[")
    return ", ".join([name, *(option.partition("=")[2] for option in options.split(", ") if option)])


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text."""
    rows = ["| " + " | ".join(line) + " |" for line in (heads, *lines)]
    return "\n".join([rows[0], "|---" + "|---:" * (len(heads) - 1) + "|", *rows[1:]])


def rows(found: Mapping[str, Any]) -> str:
    """A line per method: what was tuned, the metric, the loss, the aggregation error, and the difference from FedIT."""
    chosen = {one["method"]: one["chosen"] for one in found["tuning"]}
    loss = {one["method"]: one["value"] for one in found["others"] if one["figure"] == "loss"}
    return table(
        ["method", "rate", found["metric"], "loss", "error", "minus FedIT"],
        [
            [
                short(row["method"]),
                ", ".join(f"{value:g}" for value in chosen[row["method"]].values()),
                told(row["scores"]["global"]),
                told(loss[row["method"]]),
                told(row["error"]),
                told(row["difference"], "+"),
            ]
            for row in found["rows"]
        ],
    )


def declared(found: Mapping[str, Any]) -> str:
    """A line per comparison that was declared before the first score."""
    return table(
        ["declared comparison", found["metric"], "p", "p, Holm"],
        [
            [
                f"{short(one['first'])} minus {short(one['second'])}",
                told(one["difference"], "+"),
                f"{one['p_value']:.1g}",
                f"{one['adjusted']:.1g}",
            ]
            for one in found["declared"]
        ],
    )


def later(found: Mapping[str, Any]) -> str:
    """Momentum beside FedIT at rounds after the study's last, differences paired by seed."""
    figures = {round_: one["accuracy"] | {"loss": one["loss"]} for round_, one in found["gone_on_with"].items()}
    lines = [
        [
            round_,
            *(told(estimate(list(one[name].values()))) for name in ("fedit", "momentum")),
            told(one["difference"], "+"),
            f"{one['p_value']:.1g}",
            told(one["loss"]["difference"], "+"),
        ]
        for round_, one in figures.items()
    ]
    return table(["after round", "fedit", "momentum", "difference, accuracy", "p", "difference, loss"], lines)


KINDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"rows": rows, "declared": declared, "later": later}


def filled(text: str) -> str:
    """The page with its tables."""

    def written(mark: re.Match[str]) -> str:
        found = json.loads((ROOT / "docs" / "study" / f"{mark[2]}.json").read_text())
        return f"{mark[1]}\n{KINDS[mark[3]](found)}\n\n{mark[4]}"

    return MARK.sub(written, text)


def main() -> None:
    page = ROOT / "docs" / "study.md"
    settle({page: filled(page.read_text())})


if __name__ == "__main__":
    main()
