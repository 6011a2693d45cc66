"""The tables of docs/first-study.md from finished runs: nothing is trained here.

    python benchmarks/findings.py STUDY [--rows ROWS.json ...]

STUDY is a folder of `florana compare`; ROWS are what `benchmarks/distance.py --score --out` kept. Printed as Markdown:
rank correlation of error and score (fixed-updates ablation and full runs), local against global, score per byte, server
time.

    rho = Spearman's over rules, of one seed and round; +1 means: the lower the error, the better the score

is averaged over seeds. Its interval resamples whole seeds 10,000 times (percentiles 2.5 and 97.5); with few seeds that
is too narrow, so Student's interval stands beside it. A seed in which no rule changes the score has no rho and is left
out, and counted. All differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florana.report.views import RunView, view
from florana.study.estimates import Estimate, estimate, paired
from florana.study.grid import Cell, Setting
from florana.study.named_methods import method_of
from florana.study.publish import rank_correlation

Row = Mapping[str, Any]
SHARED_START = ("fedit", "flora-na", "best-rank", "fedex-lora", "oracle")
"""Methods whose clients train both factors from one start: full runs of the others differ in more than the error."""


def line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(cells: Sequence[str], left: int = 1) -> str:
    return line(cells) + "\n|" + "---|" * left + "---:|" * (len(cells) - left)


def shown(found: Estimate | None, digits: int = 3, *, sign: str = "") -> str:
    if found is None:
        return "-"
    half = "" if found.half is None else f" ± {found.half:.{digits}f}"
    if found.low is not None and found.high is not None:
        half = f" ({found.low:.{digits}f} to {found.high:.{digits}f})"
    return f"{found.mean:{sign}.{digits}f}{half}"


def bootstrap(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, whole seeds drawn with replacement by a fixed generator."""
    means = np.random.default_rng(0).choice(np.array(values), (draws, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def correlation(label: Sequence[str], by_seed: Mapping[int, float | None], rules: int) -> str:
    known = [value for value in by_seed.values() if value is not None]
    found = estimate(known)
    between = "{:+.2f} to {:+.2f}".format(*bootstrap(known)) if len(known) > 1 else "-"
    return line([*label, rules, shown(found, 2, sign="+"), between, f"{len(known)}/{len(by_seed)}"])


def swapped(rows: Sequence[Row], name: str, metric: str) -> list[str]:
    """One line per round, and one of each seed's mean over rounds. FedEx-LoRA's merge is the oracle's: one of them."""
    rows = [row for row in rows if row["method"] != "fedex-lora"]
    seeds = sorted({row["seed"] for row in rows})
    every: dict[int, list[float]] = {seed: [] for seed in seeds}
    lines = []
    rounds = sorted({row["round"] for row in rows if metric in row})
    rules = len({row["method"] for row in rows})
    for round_ in rounds:
        own = {s: [(r["error"], r[metric]) for r in rows if (r["seed"], r["round"]) == (s, round_)] for s in seeds}
        found = {seed: rank_correlation(pairs, metric) for seed, pairs in own.items()}
        for seed, value in found.items():
            every[seed] += [] if value is None else [value]
        lines.append(correlation([name, metric, f"round {round_}"], found, rules))
    means = {seed: statistics.fmean(values) if values else None for seed, values in every.items()}
    return [*lines, correlation([name, metric, "mean of rounds"], means, rules)] if len(rounds) > 1 else lines


def exchanged(rows: Sequence[Row], metric: str, digits: int) -> str:
    """Per rule and round: the error, and the score's difference from FedIT's merge of the same updates."""
    rounds = sorted({row["round"] for row in rows if metric in row})
    names = [text for n in rounds for text in (f"error, round {n}", f"{metric} minus FedIT's (p)")]
    lines = [head(["rule", *names])]
    fedit = {(r["seed"], r["round"]): r[metric] for r in rows if r["method"] == "fedit" and metric in r}
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f"`{method}`"]
        for round_ in rounds:
            own = [row for row in rows if (row["round"], row["method"]) == (round_, method)]
            scores, others = {r["seed"]: r[metric] for r in own}, {s: v for (s, n), v in fedit.items() if n == round_}
            difference, p_value = paired(scores, others)
            cells.append(shown(estimate([r["error"] for r in own])))
            change = shown(difference, digits, sign="+") + ("" if p_value is None else f" ({p_value:.2f})")
            cells.append(f"its {metric}: {shown(estimate(list(others.values())))}" if method == "fedit" else change)
        lines.append(line(cells))
    return "\n".join(lines)


def runs_of(folder: Path, study: Mapping[str, Any]) -> dict[tuple[str, str], dict[int, RunView]]:
    """(setting, method) -> seed -> its finished run."""
    rounds = max(len(view(path.parent).records) for path in folder.glob("runs/*/*/*/rounds.jsonl"))
    found: dict[tuple[str, str], dict[int, RunView]] = {}
    names = {row["method"] for row in study["rows"]}
    seeds = {int(point["seed"]) for row in study["rows"] for point in row["points"]}
    for path in sorted(folder.glob("runs/*/seed-*/*/rounds.jsonl")):
        own = path.parent.name
        method = next(name for name in names if _folder(name) == own)
        run = view(path.parent, method)
        seed = int(path.parts[-3].removeprefix("seed-"))
        if len(run.records) == rounds and seed in seeds:
            found.setdefault((path.parts[-4], method), {})[seed] = run
    order = [(row["setting"], row["method"]) for row in study["rows"]]
    return {key: found[key] for key in order if key in found}


def _folder(method: str) -> str:
    return Cell(Setting(0), method_of(method)).id.split("/")[-1]


def full_runs(runs: Mapping[tuple[str, str], Mapping[int, RunView]], setting: str, metric: str) -> str:
    """Each seed's rho of (mean error over rounds, final score) over the methods with one start."""
    own = {m: place for (s, m), place in runs.items() if s == setting and m.startswith(SHARED_START)}
    found = {}
    for seed in sorted({seed for place in own.values() for seed in place}):
        pairs = [
            (statistics.fmean(r.error["overall"] for r in place[seed].records), last(place[seed], metric))
            for place in own.values()
            if seed in place
        ]
        found[seed] = rank_correlation(pairs, metric)
    return correlation([setting, metric, "full runs"], found, len(own))


def last(run: RunView, metric: str) -> float:
    return [r.eval["global"][metric] for r in run.records if metric in r.eval.get("global", {})][-1]


def byte_lines(runs: Mapping[tuple[str, str], Mapping[int, RunView]], setting: str, rows: Sequence[Row]) -> list[str]:
    """Score, bytes, and what a megabyte bought: (final score - start) / megabytes both ways."""
    lines = []
    for row in (row for row in rows if row["setting"] == setting and row["bytes_up"] > 0):
        place = runs.get((setting, row["method"]), {})
        gains = [
            (score - run.start) / (run.bytes_so_far[len(run.records)] / 1e6)
            for run in place.values()
            if run.start is not None and (score := run.final("global")) is not None
        ]
        if not gains or row["method"] == "centralised":
            continue
        target = "-" if not row["reached"] else f"{row['bytes_to_target'] / 1e6:.1f} ({row['reached']}/{row['seeds']})"
        score, less = (None if row[k] is None else Estimate(**row[k]) for k in ("score", "difference"))
        cells = [f"`{row['method']}`", shown(score), shown(less, sign="+") if less else ""]
        cells += [f"{row[way] / 1e6:.1f}" for way in ("bytes_up", "bytes_down")]
        lines.append(line([*cells, shown(estimate([1000 * gain for gain in gains]), 2), target]))
    return lines


def server_lines(runs: Mapping[tuple[str, str], Mapping[int, RunView]], setting: str) -> list[str]:
    """Milliseconds of the server's step, a seed's median round; and as a multiple of FedIT's on the same seed."""
    typical = {
        method: {seed: statistics.median(1e3 * r.server_seconds for r in run.records) for seed, run in place.items()}
        for (own, method), place in runs.items()
        if own == setting and method not in ("centralised", "local-only")
    }
    base = typical["fedit"]
    return [
        line([f"`{method}`", shown(estimate(list(found.values())), 1),
              shown(estimate([value / base[seed] for seed, value in found.items() if seed in base]), 1)])
        for method, found in typical.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    study = json.loads((arguments.study / "study.json").read_text())
    runs = runs_of(arguments.study, study)
    settings = list(dict.fromkeys(setting for setting, _ in runs))
    metric = study["metric"]
    tests = [(s, [r for r in study["swap_rows"] if r["setting"] == s], (metric, "loss")) for s in settings]
    for path in arguments.rows:
        kept = json.loads(path.read_text())
        base = [row for row in kept["rows"] if not row["factor"]]
        tests.append((kept["source"], base, ("accuracy", "loss") if any("accuracy" in r for r in base) else ("loss",)))
    print("Rank correlation of lower error with a better score\n")
    print(head(["source", "score", "when", "rules", "rho, Student's interval", "bootstrap over seeds", "seeds"], 3))
    for name, rows, metrics in tests:
        for one in metrics:
            print("\n".join(swapped(rows, name, one)))
    for setting in settings:
        for one in (metric, "loss"):
            print(full_runs(runs, setting, one))
    print("\nThe fixed-updates ablation: one rule for another on the same updates")
    for name, rows, metrics in tests:
        for one in metrics:
            print(f"\n{name}, {one}\n\n{exchanged(rows, one, 4)}")
    for setting in settings:
        own = [row for row in study["rows"] if row["setting"] == setting]
        print(f"\nLocal against global, {setting}\n")
        figures = ("global", "personal", "gap", "clients_on_common")
        print(head(["method", *figures, "seeds"]))
        for row in own:
            scores = [shown(Estimate(**row["scores"][f]) if f in row["scores"] else None) for f in figures]
            print(line([f"`{row['method']}`", *scores, row["seeds"]]))
        print(f"\nScore and bytes, {setting}\n")
        names = ["method", metric, "minus FedIT", "MB up", "MB down", "gain per GB", "MB to FedIT's final score"]
        print(head(names))
        rows = [{**row, "score": row["scores"].get("global")} for row in own]
        print("\n".join(byte_lines(runs, setting, rows)))
        print(f"\nThe server's step, {setting}\n")
        print(head(["method", "ms, median round", "of FedIT"]))
        print("\n".join(server_lines(runs, setting)))


if __name__ == "__main__":
    main()
