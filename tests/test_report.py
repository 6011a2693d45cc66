"""The report: one self-contained file that says what the run folders say."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from florana.errors import InputError
from florana.recipe.load import check
from florana.report.figures import not_too_close
from florana.report.page import write_report
from florana.report.views import summary, views
from florana.report.weights import weight_rows
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from tests.conftest import ROOT
from tests.hostile import STRINGS, forbidden


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, sentences: Path) -> list[Path]:
    table: dict[str, Any] = {
        "title": "a <b>title</b>",
        "task": "sequence-classification",
        "model": {"base": str(tiny_bert), "target_modules": ["query"], "rank": 2, "alpha": 4},
        "data": {"train": str(sentences), "label": "label", "max_length": 16},
        "partition": {"kind": "dirichlet", "clients": 3, "alpha": 1.0},
        "train": {"steps": 2, "batch_size": 8},
        "federation": {"rounds": 2},
    }
    out = tmp_path_factory.mktemp("runs")
    setup = prepare(check({**table, "strategy": {"name": "fedit"}}, "t"))
    names = ["fedit", "flora-na", "oracle"]
    for name in names:
        execute(check({**table, "strategy": {"name": name}}, "t"), out / name, setup=setup)
    return [out / name for name in names]


def test_the_page_is_whole_and_self_contained(folders: list[Path], tmp_path: Path) -> None:
    page = write_report(folders, tmp_path / "deep" / "r.html").read_text()
    assert page.count("<svg") == 4 + 2  # curves, error, bytes, partition; modules of the two inexact runs
    assert "a &lt;b&gt;title&lt;/b&gt;" in page
    assert "<script" not in page
    links = re.findall(r'(?:href|src)="([^"#][^"]*)"', page)
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.findall(r"url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "two pictures share an id: one would be drawn with the other's shapes"
    for used in re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'href="#([^"]+)"', page):
        assert used in ids
    assert page.count('role="img" aria-label="') == page.count("<svg")


def test_the_same_runs_give_the_same_page(folders: list[Path], tmp_path: Path) -> None:
    first = write_report(folders, tmp_path / "a.html").read_bytes()
    assert write_report(folders, tmp_path / "b.html").read_bytes() == first


def test_the_table_is_what_the_journal_says(folders: list[Path]) -> None:
    runs = views(folders)
    rows = summary(runs)
    for run, row in zip(runs, rows, strict=True):
        last = run.records[-1]
        assert row["global"] == last.eval["global"]["accuracy"]
        assert row["gap"] == pytest.approx(row["personal"] - row["global"])
        assert row["bytes_down"] == sum(r.bytes_down for r in run.records)
        assert row["error"] == last.error["overall"]
        assert row["start"] == run.setup["start"]["accuracy"]
    assert [row["strategy"] for row in rows] == ["fedit", "flora-na", "oracle"]


def test_two_runs_of_one_strategy_are_told_apart(folders: list[Path]) -> None:
    names = [run.name for run in views([folders[0], folders[0]])]
    assert names == ["fedit (fedit)", "fedit (fedit)"]


def test_a_run_without_a_round_is_an_error(folders: list[Path], tmp_path: Path) -> None:
    for name in ("recipe.toml", "setup.json"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    with pytest.raises(InputError, match="no committed round"):
        write_report([tmp_path], tmp_path / "r.html")


def test_the_page_of_a_run_with_hostile_names(folders: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folders[0], run)
    setup = json.loads((run / "setup.json").read_text())
    names = [t for t in STRINGS if len(t) < 200]
    clients = next(iter(setup["clients"].values()))
    setup["clients"] = {**setup["clients"], **dict.fromkeys(names, clients)}
    setup["labels"] = ["$\\frac{", "\x1b[2J"] if setup["labels"] else setup["labels"]
    (run / "setup.json").write_text(json.dumps(setup))
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line, text in zip(lines, ("\x1b[2J[/nope]", "\u202e<b>"), strict=False):
        line["refused"] = {text: text}
        line["strategy"] = "$\\frac{ \x07"
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([run], tmp_path / "r.html").read_text()
    assert forbidden(page, keep="\n\t") == ""
    assert "<script>alert" not in page


@pytest.mark.parametrize("name", ["page.html.j2", "comparison.html.j2"])
def test_pages_allow_no_script_and_load_nothing(name: str) -> None:
    """Drawn by a browser with this policy, a page of a hostile run can show text and nothing else."""
    text = (ROOT / "src" / "florana" / "report" / name).read_text()
    policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    assert text.index("Content-Security-Policy") < text.index("<title>")
    assert not re.search(r"<script|<link|\bon\w+=|src=\"http", text)


def test_a_run_that_the_server_did_not_measure_shows_what_the_clients_said(folders: list[Path], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (folders[0] / "rounds.jsonl").read_text().splitlines()]
    shutil.copytree(folders[0], tmp_path / "run")
    unmeasured = "".join(json.dumps({**line, "eval": {}}) + "\n" for line in lines)
    (tmp_path / "run" / "rounds.jsonl").write_text(unmeasured)
    page = write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    assert "mean training loss, round by round" in page
    assert "on the common test set, round by round" not in page


def test_pictures_take_the_pages_own_colours(folders: list[Path], tmp_path: Path) -> None:
    page = write_report([folders[0]], tmp_path / "r.html").read_text()
    assert "prefers-color-scheme: dark" in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert pictures
    for picture in pictures:
        assert "currentColor" in picture
        assert "#000000" not in picture
        assert not re.search(r'<path[^>]*style="fill: #ffffff[^"]*"[^>]*/>\s*</g>\s*<g id="[^"]*axes_1"', picture)


def test_a_scale_of_scores_is_a_tenth_at_least() -> None:
    axes = Figure().subplots()
    axes.plot([0, 1], [0.50, 0.51])
    not_too_close(axes, "accuracy")
    low, high = axes.get_ylim()
    assert (round(high - low, 6), low < 0.5 < 0.51 < high) == (0.1, True)
    wide = Figure().subplots()
    wide.plot([0, 1], [0.1, 0.9])
    before = wide.get_ylim()
    not_too_close(wide, "accuracy")
    assert wide.get_ylim() == before
    loss = Figure().subplots()
    loss.plot([0, 1], [0.50, 0.51])
    not_too_close(loss, "loss")
    assert loss.get_ylim()[1] - loss.get_ylim()[0] < 0.1


def test_the_page_says_who_counted_for_less(folders: list[Path], tmp_path: Path) -> None:
    plain = views(folders[:1])[0]
    records = [replace(record, notes={}) for record in plain.records]
    assert dict(weight_rows(replace(plain, records=records))) == {
        "Weights": "by number of examples, one client at most 0.5"
    }
    notes: list[dict[str, Any]] = [
        {"capped": {"b": 0.8}},
        {"capped": {"b": 0.9}, "robust": {"rule": "trimmed", "counts": {"a": 0.25, "b": 1.0, "c": 1.25}}},
    ]
    held = replace(plain, records=[replace(r, notes=n) for r, n in zip(records, notes, strict=True)])
    assert dict(weight_rows(held))["At the cap"] == "b in 2 of 2 rounds (asked for up to 0.9)"
    ruled = replace(held, recipe={**held.recipe, "robust": {"rule": "trimmed"}})
    rows = dict(weight_rows(ruled))
    assert rows["Weights"] == "by number of examples, one client at most 0.4"
    assert rows["Robust rule"] == "trimmed: a in 1 of 2 rounds (left down to 0.25)"
    free = {**held.recipe["federation"], "max_weight": 1.0, "weighting": "uniform"}
    assert dict(weight_rows(replace(plain, records=records, recipe={**held.recipe, "federation": free}))) == {
        "Weights": "uniform"
    }
    assert "one client at most 0.5" in write_report(folders, tmp_path / "r.html").read_text()
