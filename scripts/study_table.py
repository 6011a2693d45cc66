"""The tables of docs/study.md and docs/first-study.md, from the figures under docs/study/.

    python scripts/study_table.py [--check]

Between `<!-- study: NAME KIND -->` and `<!-- end of study -->` stands what docs/study/NAME.json says: its methods
(`rows`), its declared comparisons (`declared`), or momentum beside FedIT at rounds after the last (`later`); of several
names, with commas between them, the methods (`regimes`) or the declared comparisons (`declared-in`) side by side.

What `benchmarks/distance.py --out` kept makes `distance`; of what `benchmarks/findings.py --out` kept, and of the first
behind it, come that script's tables: `correlations`, `merges`, `merges-loss`, `gone-on`, `gone-on-loss`, `local`,
`bytes`, `server`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
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


def regimes(studies: Mapping[str, Mapping[str, Any]]) -> str:
    """The same methods in several studies: rate, score and difference from FedIT in each."""
    heads, lines = ["method"], dict[str, list[str]]()
    for name, found in studies.items():
        heads += [f"{name.partition('-')[2]}: rate", found["metric"], "minus FedIT"]
        chosen = {one["method"]: one["chosen"] for one in found["tuning"]}
        for row in found["rows"]:
            rate = ", ".join(f"{value:g}" for value in chosen[row["method"]].values())
            own = [rate, told(row["scores"]["global"]), told(row["difference"], "+")]
            lines.setdefault(row["method"], [short(row["method"])]).extend(own)
    return table(heads, list(lines.values()))


def declared_in(studies: Mapping[str, Mapping[str, Any]]) -> str:
    """The declared comparisons of several studies, each corrected within its own."""
    heads, lines = ["declared comparison"], dict[tuple[str, str], list[str]]()
    for name, found in studies.items():
        heads += [f"{name.partition('-')[2]}: {found['metric']}", "p, Holm"]
        for one in found["declared"]:
            pair = short(one["first"]), short(one["second"])
            lines.setdefault(pair, [" minus ".join(pair)]).extend(
                [told(one["difference"], "+"), f"{one['adjusted']:.1g}"]
            )
    return table(heads, list(lines.values()))


def distance(studies: Mapping[str, Mapping[str, Any]]) -> str:
    """How far each rule is from the exact average."""
    (found,) = studies.values()
    return str(_benchmark("distance").table(found["rows"]))


def finding(kind: str) -> Callable[[Mapping[str, Mapping[str, Any]]], str]:
    """A table of `benchmarks/findings.py`, of the first file; `merges` and `gone-on`: of the last file's ablation."""

    def made(studies: Mapping[str, Mapping[str, Any]]) -> str:
        script, (first, *more) = _benchmark("findings"), studies.values()
        if kind == "correlations":
            return str(script.correlations(first, more))
        if kind.startswith(("merges", "gone-on")):
            tests = [one for one in script.ablations(first, more) if ("gone on" in one[0]) == ("gone-on" in kind)]
            _, rows, scored = tests[-1]
            return str(script.exchanged(rows, "loss" if kind.endswith("loss") else scored[0], 4))
        (setting,) = script.settings_of(first)
        return str(getattr(script, {"bytes": "per_byte"}.get(kind, kind))(first, setting))

    return made


def _benchmark(name: str) -> Any:
    """A script of benchmarks/, where the functions that print its tables stand."""
    sys.path.append(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


KINDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"rows": rows, "declared": declared, "later": later}
SEVERAL: Mapping[str, Callable[[Mapping[str, Mapping[str, Any]]], str]] = {
    "regimes": regimes,
    "declared-in": declared_in,
    "distance": distance,
    **{kind: finding(kind) for kind in ("correlations", "merges", "merges-loss", "gone-on", "gone-on-loss")},
    **{kind: finding(kind) for kind in ("local", "bytes", "server")},
}


def filled(text: str) -> str:
    """The page with its tables."""

    def written(mark: re.Match[str]) -> str:
        names = mark[2].split(",")
        found = {name: json.loads((ROOT / "docs" / "study" / f"{name}.json").read_text()) for name in names}
        made = SEVERAL[mark[3]](found) if mark[3] in SEVERAL else KINDS[mark[3]](found[mark[2]])
        return f"{mark[1]}\n{made}\n\n{mark[4]}"

    return MARK.sub(written, text)


def main() -> None:
    pages = [ROOT / "docs" / name for name in ("study.md", "first-study.md")]
    settle({page: filled(page.read_text()) for page in pages})


if __name__ == "__main__":
    main()
