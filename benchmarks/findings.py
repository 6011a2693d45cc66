"""The tables of docs/first-study.md from finished runs: nothing is trained here.

    python benchmarks/findings.py STUDY [--rows ROWS.json ...] [--out FIGURES.json]

STUDY is a folder of `florana compare`, or what --out kept of one; ROWS are what `benchmarks/distance.py --score --out`
kept. Printed as Markdown: rank correlation of error and score (fixed-updates ablation and full runs), local against
global, score per byte, server time. Of files under docs/study, `scripts/study_table.py` puts the same tables into the
page.

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
ROW = ("setting", "method", "seeds", "scores", "difference", "bytes_up", "bytes_down", "reached", "bytes_to_target")
"""What is kept of a study's row."""
SWAP = ("setting", "seed", "round", "method", "error")
"""What is kept of a row of the fixed-updates ablation, beside its scores."""
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


def figures_of(folder: Path) -> dict[str, Any]:
    """What the tables need of a study: of its own figures, and of each finished run."""
    study = json.loads((folder / "study.json").read_text())
    runs = [
        {
            "setting": setting,
            "method": method,
            "seed": seed,
            "start": run.start,
            "final": run.final("global"),
            "last": {m: last(run, m) for m in (study["metric"], "loss") if run.final("global") is not None},
            "bytes": run.bytes_so_far[len(run.records)],
            "error": mean_error(run),
            "server_ms": statistics.median(1e3 * record.server_seconds for record in run.records),
        }
        for (setting, method), place in runs_of(folder, study).items()
        for seed, run in place.items()
    ]
    rows = [{key: row[key] for key in ROW if key in row} for row in study["rows"]]
    swaps = [scores_in(row, SWAP, study["metric"]) for row in study["swap_rows"]]
    return {"metric": study["metric"], "rows": rows, "swap_rows": swaps, "runs": runs}


def scores_in(row: Row, keys: Sequence[str], metric: str) -> dict[str, Any]:
    """What is kept of a row of the ablation: those keys, its scores, and those it came to by going on."""
    kept = {key: row[key] for key in (*keys, metric, "loss") if key in row}
    return kept | ({"on": scores_in(row["on"], (), metric)} if "on" in row else {})


def mean_error(run: RunView) -> float | None:
    """Over its rounds; None of a method that has no global product."""
    errors = [record.error["overall"] for record in run.records]
    return None if None in errors else statistics.fmean(errors)


def last(run: RunView, metric: str) -> float:
    return [r.eval["global"][metric] for r in run.records if metric in r.eval.get("global", {})][-1]


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


def full_runs(runs: Sequence[Row], setting: str, metric: str) -> str:
    """Each seed's rho of (mean error over rounds, final score) over the methods with one start."""
    own = [run for run in runs if run["setting"] == setting and run["method"].startswith(SHARED_START)]
    found = {
        seed: rank_correlation([(run["error"], run["last"][metric]) for run in own if run["seed"] == seed], metric)
        for seed in sorted({run["seed"] for run in own})
    }
    return correlation([setting, metric, "full runs"], found, len({run["method"] for run in own}))


def byte_lines(runs: Sequence[Row], setting: str, rows: Sequence[Row]) -> list[str]:
    """Score, bytes, and what a megabyte bought: (final score - start) / megabytes both ways."""
    lines = []
    for row in (row for row in rows if row["setting"] == setting and row["bytes_up"] > 0):
        gains = [
            (run["final"] - run["start"]) / (run["bytes"] / 1e6)
            for run in runs
            if (run["setting"], run["method"]) == (setting, row["method"]) and None not in (run["start"], run["final"])
        ]
        if not gains or row["method"] == "centralised":
            continue
        target = "-" if not row["reached"] else f"{row['bytes_to_target'] / 1e6:.1f} ({row['reached']}/{row['seeds']})"
        found = row["scores"].get("global"), row["difference"]
        score, less = (None if one is None else Estimate(**one) for one in found)
        cells = [f"`{row['method']}`", shown(score), shown(less, sign="+") if less else ""]
        cells += [f"{row[way] / 1e6:.1f}" for way in ("bytes_up", "bytes_down")]
        lines.append(line([*cells, shown(estimate([1000 * gain for gain in gains]), 2), target]))
    return lines


def server_lines(runs: Sequence[Row], setting: str) -> list[str]:
    """Milliseconds of the server's step, a seed's median round; and as a multiple of FedIT's on the same seed."""
    typical: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["setting"] == setting and run["method"] not in ("centralised", "local-only"):
            typical.setdefault(run["method"], {})[run["seed"]] = run["server_ms"]
    base = typical["fedit"]
    return [
        line([f"`{method}`", shown(estimate(list(found.values())), 1),
              shown(estimate([value / base[seed] for seed, value in found.items() if seed in base]), 1)])
        for method, found in typical.items()
    ]  # fmt: skip


def correlations(figures: Mapping[str, Any], more: Sequence[Mapping[str, Any]]) -> str:
    """The table of rank correlations: of the ablations, then of full runs."""
    lines = [head(["source", "score", "when", "rules", "rho, Student's interval", "bootstrap over seeds", "seeds"], 3)]
    for name, rows, metrics in ablations(figures, more):
        for one in metrics:
            lines += swapped(rows, name, one)
    for setting in settings_of(figures):
        lines += [full_runs(figures["runs"], setting, one) for one in (figures["metric"], "loss")]
    return "\n".join(lines)


def ablations(
    figures: Mapping[str, Any], more: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[Row], tuple[str, ...]]]:
    """(name, rows, what was scored) of each fixed-updates ablation."""
    tests: list[tuple[str, list[Row], tuple[str, ...]]] = []
    for setting in settings_of(figures):
        own = [row for row in figures["swap_rows"] if row["setting"] == setting]
        tests.append((setting, own, (figures["metric"], "loss")))
        if on := [{**row, **row["on"]} for row in own if "on" in row]:
            tests.append((f"{setting}, gone on", on, (figures["metric"], "loss")))
    for kept in more:
        base = [row for row in kept["rows"] if not row["factor"]]
        scored = ("accuracy", "loss") if any("accuracy" in row for row in base) else ("loss",)
        tests.append((kept["source"], base, scored))
    return tests


def settings_of(figures: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["setting"] for run in figures["runs"]))


def local(figures: Mapping[str, Any], setting: str) -> str:
    """Scores of the global model and of the clients' own."""
    names = ("global", "personal", "gap", "clients_on_common")
    lines = [head(["method", *names, "seeds"])]
    for row in figures["rows"]:
        if row["setting"] == setting:
            scores = [shown(Estimate(**row["scores"][f]) if f in row["scores"] else None) for f in names]
            lines.append(line([f"`{row['method']}`", *scores, row["seeds"]]))
    return "\n".join(lines)


def per_byte(figures: Mapping[str, Any], setting: str) -> str:
    """Scores beside bytes."""
    names = ["method", figures["metric"], "minus FedIT", "MB up", "MB down", "gain per GB", "MB to FedIT's final score"]
    return "\n".join([head(names), *byte_lines(figures["runs"], setting, figures["rows"])])


def server(figures: Mapping[str, Any], setting: str) -> str:
    """The time of the server's step."""
    return "\n".join([head(["method", "ms, median round", "of FedIT"]), *server_lines(figures["runs"], setting)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kept = arguments.study.is_file()
    figures = json.loads(arguments.study.read_text()) if kept else figures_of(arguments.study)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    more = [json.loads(path.read_text()) for path in arguments.rows]
    print("Rank correlation of lower error with a better score\n")
    print(correlations(figures, more))
    print("\nThe fixed-updates ablation: one rule for another on the same updates")
    for name, rows, metrics in ablations(figures, more):
        for one in metrics:
            print(f"\n{name}, {one}\n\n{exchanged(rows, one, 4)}")
    for setting in settings_of(figures):
        print(f"\nLocal against global, {setting}\n\n{local(figures, setting)}")
        print(f"\nScore and bytes, {setting}\n\n{per_byte(figures, setting)}")
        print(f"\nThe server's step, {setting}\n\n{server(figures, setting)}")


if __name__ == "__main__":
    main()
