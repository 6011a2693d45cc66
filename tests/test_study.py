"""Studies: the grid, cells that share what they must, resume, gaps, figures against hand arithmetic, the fixed-updates
ablation."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import rich.console
from scipy import stats

from florana.cli.display_study import others_table
from florana.errors import FederationError, RecipeError
from florana.federation.journal import read_records
from florana.recipe.load import check
from florana.report.views import view
from florana.strategy.conformance import check_rule
from florana.study import jobs, runner
from florana.study.estimates import Estimate, estimate, paired
from florana.study.formats import as_csv, latex, markdown, other_cells
from florana.study.grid import Cell, Plan, Setting, plan_of, recipe_of
from florana.study.named_methods import method_of, split_methods
from florana.study.publish import publish
from florana.study.runner import alone_in, execute_study, folder_of, rounds_left, swap_file
from florana.study.table import Comparison, Other, compare
from tests.program import florana, wait_for

OWN = """
from florana import best_rank, mean
import torch

def fine(parts, rank):
    return best_rank(parts, rank)

def first(parts, rank):
    return parts[0].adapter

def greedy(parts, rank):
    for part in parts:
        for pair in part.adapter.modules.values():
            pair.B.mul_(2)
    return mean(parts)

def breaks(parts, rank):
    raise ValueError("no such luck")

def nothing(parts, rank):
    return None

thing = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def small(recipe_table: dict[str, Any]) -> dict[str, Any]:
    recipe_table["federation"] = {"rounds": 2}
    recipe_table["evaluate"] = {"personal": "last", "every": 1}
    return recipe_table


def test_the_grid_is_methods_by_settings_and_fedit_is_always_in_it(small: dict[str, Any]) -> None:
    plan = plan_of(check(small, "t"), methods=["best-rank[carry_rank=4]"], seeds=2, alphas=[0.1, 1.0], ranks=[2, 4])
    assert [m.label for m in plan.methods] == [
        "fedit",
        "best-rank[carry_rank=4]",
        "oracle",
        "centralised",
        "local-only",
    ]
    assert len(plan.cells) == 5 * 2 * 2 * 2
    assert len({cell.id for cell in plan.cells}) == len(plan.cells)
    recipe = recipe_of(plan.base, Cell(Setting(7, 0.1, 4), method_of("best-rank[carry_rank=4]")))
    assert (recipe.seed, recipe.partition.alpha, recipe.model.rank) == (7, 0.1, 4)
    assert recipe.model.alpha / recipe.model.rank == 3.0  # the recipe's alpha / rank
    assert recipe.strategy == {"name": "best-rank", "carry_rank": 4}
    assert plan.fixed_updates_rounds == [1, 2]


def test_the_recipes_own_study_section_counts_and_the_options_come_first(small: dict[str, Any]) -> None:
    small["study"] = {"methods": ["flora-na"], "seeds": 2, "alphas": [0.3], "controls": []}
    assert [m.label for m in plan_of(check(small, "t")).methods] == ["fedit", "flora-na"]
    plan = plan_of(check(small, "t"), methods=["fedrot"], seeds=1, alphas=[2.0])
    assert [m.label for m in plan.methods] == ["fedit", "fedrot"]
    assert [s.alpha for s in plan.settings] == [2.0]
    assert recipe_of(plan.base, plan.cells[0]).study is None


def test_centralised_takes_the_steps_of_all_clients_together(small: dict[str, Any]) -> None:
    plan = plan_of(check(small, "t"), seeds=1)
    cell = next(c for c in plan.cells if c.method.label == "centralised")
    pooled = recipe_of(plan.base, cell)
    assert pooled.partition.clients == 1
    assert pooled.train.steps == 3 * 4  # three steps, four clients
    small["partition"] = {"kind": "column", "by": "label"}
    with pytest.raises(RecipeError, match="how many clients a round has"):
        plan_of(check(small, "t"), seeds=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedt", "did you mean 'fedit'"),
        ("best-rank[carry_rank]", "not key=value"),
        ("best-rank[carry_rnk=3]", "did you mean 'carry_rank'"),
        ("best-rank[", "is no method"),
        ("missing.py:rule", "there is no file"),
    ],
)
def test_wrong_methods_are_refused(name: str, message: str, small: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of(check(small, "t"), methods=[name])


def test_methods_are_split_outside_brackets() -> None:
    assert split_methods("a,b[x=1,y=2], c.py:d") == ["a", "b[x=1,y=2]", "c.py:d"]
    assert split_methods("") == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("first", "order of clients matters.*weights are ignored"),
        ("greedy", "changes its inputs"),
        ("breaks", "no such luck"),
        ("nothing", "gives a NoneType"),
        ("thing", "has no function 'thing'"),
        ("gone", "it has: .*fine"),
    ],
)
def test_a_method_of_ones_own_must_keep_the_contract(
    function: str, message: str, own: Path, small: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(check(small, "t"), methods=[f"{own}:{function}"])
    assert re.search(message, str(caught.value)), str(caught.value)


def test_the_contract_passes_what_florana_itself_offers() -> None:
    from florana import best_rank, mean, mix
    from florana.aggregate.fair import corrected_mean

    for rule in (lambda p, r: mean(p), lambda p, r: mix(p).adapter, best_rank, lambda p, r: corrected_mean(p)):
        check_rule(rule, "florana's")


@pytest.fixture
def done(small: dict[str, Any], own: Path, tmp_path: Path) -> tuple[Plan, Path, dict[str, str]]:
    plan = plan_of(check(small, "t"), methods=["fedit", "best-rank", "ravan", f"{own}:fine"], seeds=2)
    failures = execute_study(plan, tmp_path / "study", 1, lambda count, name: None)
    return plan, tmp_path / "study", failures


def test_a_study_shares_partitions_marks_gaps_and_is_not_done_twice(
    done: tuple[Plan, Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, failures = done
    assert set(failures) == {f"as-recipe/seed-{seed}/ravan" for seed in (3, 4)}  # its heads do not fit this model
    assert "orthonormal directions do not fit" in next(iter(failures.values()))
    shares = {
        cell.id: json.loads((folder_of(out, cell) / "setup.json").read_text())["clients"]
        for cell in plan.cells
        if cell.method.label in ("fedit", "best-rank", "fine", "oracle", "local-only")
    }
    for seed in (3, 4):
        assert len({json.dumps(v, sort_keys=True) for k, v in shares.items() if f"seed-{seed}/" in k}) == 1
    assert len({json.dumps(v, sort_keys=True) for v in shares.values()}) == 2, "seeds must differ"
    first = {s: read_records(folder_of(out, Cell(Setting(s), method_of("best-rank"))) / "rounds.jsonl") for s in (3, 4)}
    mine = read_records(out / "runs" / "as-recipe" / "seed-3" / "fine" / "rounds.jsonl")
    assert [r.eval["global"] for r in mine] == [r.eval["global"] for r in first[3]], "the same rule, another result"
    assert rounds_left(plan, out) == 2 * 2  # ravan's
    ran: list[str] = []
    monkeypatch.setattr("florana.runs.setup.execute", lambda recipe, folder, **rest: ran.append(folder.name))
    execute_study(plan, out, 1, lambda count, name: None)
    assert ran == ["ravan", "ravan"]


def test_a_study_takes_no_more_threads_than_it_was_given(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OMP_NUM_THREADS, which torch has read, is the most; a machine's cores shared by groups are the next."""
    asked: list[int] = []
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    small.pop("threads")
    monkeypatch.setattr("florana.runs.setup.execute", lambda *given, **rest: None)
    monkeypatch.setattr("florana.study.fixed_updates.swap", lambda *given: [])
    plan = plan_of(check(small, "t"), seeds=4)
    assert [runner.threads_of(plan, tmp_path / "s", jobs) for jobs in (1, 2, 4, 99)] == [3, 3, 2, 2]
    execute_study(plan, tmp_path / "s", 1, lambda count, name: None)
    assert set(asked) == {3}


def test_the_tables_figures_are_those_of_the_runs(done: tuple[Plan, Path, dict[str, str]]) -> None:
    plan, out, failures = done
    comparison, swapped, page = publish(plan, out, failures)
    rows = {row.method: row for row in comparison.rows}
    runs = {
        label: [view(folder_of(out, cell)) for cell in plan.cells if cell.method.label == label]
        for label in ("fedit", "best-rank", "local-only", "centralised")
    }
    scores = {label: [run.final("global") for run in own] for label, own in runs.items()}
    assert rows["best-rank"].scores["global"].mean == pytest.approx(np.mean(scores["best-rank"]))
    difference = np.array(scores["best-rank"]) - np.array(scores["fedit"])
    assert rows["best-rank"].difference is not None
    assert rows["best-rank"].difference.mean == pytest.approx(difference.mean())
    assert rows["best-rank"].bytes_up == np.mean([sum(r.bytes_up for r in run.records) for run in runs["best-rank"]])
    assert rows["fedit"].difference is None
    assert rows["fedit"].reached == 2, "each seed has its own target: what FedIT itself ended with there"
    finals = [run.final("global") for run in runs["fedit"]]
    first = [next((n for n, v in run.scores("global") if v >= own), None)
             for run, own in zip(runs["best-rank"], finals, strict=True)]  # fmt: skip
    got = [n for n in first if n is not None]
    assert rows["best-rank"].reached == len(got)
    assert rows["best-rank"].rounds_to_target == (pytest.approx(np.mean(got)) if got else None)
    assert rows["ravan"].seeds == 0
    assert rows["ravan"].failed == 2
    assert "global" not in rows["local-only"].scores
    assert rows["local-only"].scores["personal"].seeds == 2
    assert rows["local-only"].bytes_up < rows["fedit"].bytes_up / 5
    assert rows["centralised"].scores["global"].seeds == 2
    assert rows["oracle"].error is not None
    assert rows["oracle"].error.mean < 1e-5
    assert "2 failed" in markdown(comparison)
    losses = {(one.method, one.figure): one for one in comparison.others}
    loss = {label: [run.figures["loss"][1] for run in own] for label, own in runs.items() if label != "local-only"}
    assert losses["best-rank", "loss"].value.mean == pytest.approx(np.mean(loss["best-rank"]))
    assert losses["best-rank", "loss"].difference is not None
    apart = np.array(loss["best-rank"]) - np.array(loss["fedit"])
    assert losses["best-rank", "loss"].difference.mean == pytest.approx(apart.mean())
    assert losses["fedit", "loss"].difference is None
    assert ("local-only", "loss") not in losses, "it has no global model"
    assert "| best-rank | loss |" in markdown(comparison)
    table = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert float(table[1]["global"]) == pytest.approx(np.mean(scores["best-rank"]))
    assert latex(comparison).count(r"\\") == len(rows) + 1
    for name in ("table.md", "table.csv", "table.tex", "study.json", "report.html", "failures.json"):
        assert (out / name).exists()
    text = page.read_text()
    assert "orthonormal directions" in text
    assert "<script" not in text
    assert not re.search(r"(src|href)=.http", text)
    assert {row["method"] for row in swapped["table"]} >= {"fedit", "best-rank", "fine", "oracle"}


def test_groups_side_by_side_give_what_one_after_the_other_gives(small: dict[str, Any], tmp_path: Path) -> None:
    small["study"] = {"controls": [], "methods": ["fedit"]}
    plan = plan_of(check(small, "t"), seeds=2)
    told: list[str] = []
    assert execute_study(plan, tmp_path / "one", 1, lambda count, name: told.append(name)) == {}
    assert told == ["fedit"] * 4
    assert execute_study(plan, tmp_path / "two", 2, lambda count, name: told.append(name)) == {}
    assert len(told) == 8
    for cell in plan.cells:
        one, two = (read_records(folder_of(tmp_path / n, cell) / "rounds.jsonl") for n in ("one", "two"))
        assert [r.eval for r in one] == [r.eval for r in two]
    for setting in plan.settings:
        one, two = (json.loads(swap_file(tmp_path / n, setting).read_text())["rows"] for n in ("one", "two"))
        assert one == two


def test_estimates_are_students_and_paired_differences_scipys() -> None:
    rng = np.random.default_rng(0)
    values, other = rng.normal(size=6), rng.normal(size=6)
    found = estimate(values.tolist())
    assert found is not None
    low, high = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))  # type: ignore[operator]
    difference, p_value = paired(dict(enumerate(values)), dict(enumerate(other)))
    assert p_value == pytest.approx(stats.ttest_rel(values, other).pvalue)
    assert difference is not None
    assert difference.mean == pytest.approx((values - other).mean())
    assert estimate([None, math.nan]) is None
    assert estimate([1.0]).half is None  # type: ignore[union-attr]
    assert paired({0: 1.0}, {0: 0.5})[1] is None
    assert paired({0: 1.0, 1: None}, {1: 0.5}) == (None, None)


def test_other_figures_have_a_table_of_their_own_where_there_is_more_than_the_loss() -> None:
    half = Estimate(0.5, 0.25, 2)
    loss = Other("as-recipe", "fedit", "loss", half, None, None)
    match = Other("as-recipe", "flora-na[combine=updates]", "exact_match", half, Estimate(-0.125, 0.5, 2), 0.25)
    assert others_table(Comparison("loss", [], {}, None, [loss])) is None
    found = others_table(Comparison("loss", [], {}, None, [loss, match]))
    console = rich.console.Console(width=160, record=True, file=io.StringIO(), markup=False)
    console.print(found)
    line = console.export_text().splitlines()[-2]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "flora-na[combine=updates]", "exact_match", "0.5000 ± 0.2500", "-0.1250 ± 0.5000", "0.250", "2",
    ]  # fmt: skip


def test_compare_on_the_command_line(small: dict[str, Any], own: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    small["study"] = {"controls": ["oracle"]}
    recipe.write_text(check(small, "t").to_toml())
    arguments = [
        "compare",
        str(recipe),
        "--methods",
        "fedit,flora-na[combine=updates],own.py:fine",
        "--seeds",
        "2",
        "--jobs",
        "1",
        "--out",
        "s",
    ]
    planned = florana(*arguments, "--dry-run", "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    lines = json.loads(planned.stdout)
    assert [line["method"] for line in lines] == ["fedit", "flora-na[combine=updates]", "fine", "oracle"]
    assert {(line["runs"], line["rounds_left"]) for line in lines} == {(2, 2 * small["federation"]["rounds"])}
    assert all(line["bytes_up"] > 0 and line["seconds"] > 0 for line in lines)
    assert not (tmp_path / "s").exists(), "nothing was written"
    done = florana(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fine" in done.stdout
    assert " to " in done.stdout, "two seeds have a range"
    assert "±" not in done.stdout.partition("range)")[2].partition("tables:")[0].partition("Swap")[0]
    left = florana(*arguments, "--dry-run", cwd=tmp_path)
    assert "rounds left" in " ".join(left.stdout.split())
    assert "flora-na[combine=updates]" in done.stdout, "brackets were taken for markup"
    assert "rank correlation" in done.stdout or "Swap" not in done.stdout
    again = florana(*arguments, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert [row["method"] for row in found["rows"]] == ["fedit", "flora-na[combine=updates]", "fine", "oracle"]
    wrong = florana("compare", str(recipe), "--methods", "own.py:first", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "breaks the contract" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    odd = florana("compare", str(recipe), "--alphas", "high", cwd=tmp_path)
    assert odd.returncode == 2
    assert "--alphas 'high' is not a list of numbers" in odd.stderr


def test_jobs_fit_the_cores_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 8)
    free = {"SC_AVPHYS_PAGES": 3 * jobs.MEMORY_PER_JOB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(jobs.os, "sysconf", lambda name: free[name])
    assert jobs.default_jobs() == 3
    free["SC_AVPHYS_PAGES"] = 0
    assert jobs.default_jobs() == 1


SLEEPERS = """
import os, time
from pathlib import Path
from florana.study.jobs import in_jobs

def sleep(folder, tell):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    in_jobs(sleep, [{folder!r}] * 2, 2, print)
"""


def test_what_works_for_a_study_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    (tmp_path / "sleepers.py").write_text(SLEEPERS.format(folder=str(tmp_path / "pids")))
    study = subprocess.Popen([sys.executable, str(tmp_path / "sleepers.py")])
    assert wait_for(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
    children = psutil.Process(study.pid).children()
    assert {int(path.name) for path in (tmp_path / "pids").iterdir()} < {child.pid for child in children}
    study.kill()
    study.wait()
    assert wait_for(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children))


def _dies(item: int, tell: Callable[[str], Any]) -> int:
    if item:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_of_a_study_that_is_killed_is_named() -> None:
    with pytest.raises(FederationError, match="a process of the study ended by itself"):
        jobs.in_jobs(_dies, [0, 1, 0], 2, lambda count, name: None)


def test_one_florana_at_a_time_in_a_study(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(check(small, "t").to_toml())
    with alone_in(tmp_path / "s"):
        with alone_in(tmp_path / "s"):
            pass  # who has it may have it again
        second = florana("compare", "recipe.toml", "--out", "s", cwd=tmp_path)
    assert second.returncode == 4
    assert "another florana is working in s" in second.stderr
    assert not (tmp_path / "s" / "runs").exists()


def test_a_study_compares_nothing_before_anything_is_finished(small: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(check(small, "t"), seeds=1)
    rows = compare(plan, tmp_path / "none").rows
    assert all(row.seeds == 0 and row.failed == 1 and not row.scores for row in rows)


def test_two_seeds_have_a_range_and_no_test() -> None:
    found = estimate([0.5, 0.25])
    assert found == Estimate(0.375, None, 2, 0.25, 0.5)
    assert paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.0}) == (Estimate(0.75, None, 2, 0.5, 1.0), None)
    other = Other("as-recipe", "fedit", "loss", found, paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.0})[0], None)
    assert other_cells(other)[3:5] == ["0.3750 (0.2500 to 0.5000)", "+0.7500 (+0.5000 to +1.0000)"]
