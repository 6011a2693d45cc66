"""Whole runs with a quantized uplink: every strategy, the same bytes after a kill, the plan, the report."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from florana.federation.client_state import keep, recall
from florana.federation.error_feedback import FEEDBACK
from florana.federation.journal import Journal, read_records
from florana.federation.local_engine import LocalEngine
from florana.federation.loop import run_rounds
from florana.federation.messages import Brief, Reply, pack, unpack
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.report.page import write_report
from florana.report.views import summary, views
from florana.runs.chosen_strategy import strategy_of
from florana.runs.dry_run import plan
from florana.runs.prepared import prepare
from florana.runs.setup import clients_of, execute, federation_of
from florana.strategy import STRATEGIES
from florana.study import grid
from tests.program import florana

NARROW = ["bfloat16", "int8"]
NEW_PAIRS = {"best-rank", "oracle", "flora", "flexlora", "florist", "fedask", "fedsvd"}
"""Methods whose next pair does not continue the last: singular vectors, or fresh factors."""
SMALL = {"ravan": {"name": "ravan", "heads": 2, "size": 4}}


def made(table: dict[str, Any], **sections: Any) -> Recipe:
    table = copy.deepcopy(table)
    for name, change in sections.items():
        table[name] = {**table.get(name, {}), **change} if isinstance(change, dict) else change
    return check(table, "test")


def narrow(table: dict[str, Any], form: str, strategy: dict[str, Any], rounds: int = 3, **sections: Any) -> Recipe:
    rounds_ = {"rounds": rounds, "uplink": form, "clients_per_round": 3}
    return made(table, strategy=strategy, federation=rounds_, evaluate={"personal": "never"}, **sections)


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("form", "strategy", "model"),
    [
        *(("int8", SMALL.get(name, {"name": name}), {}) for name in STRATEGIES),
        ("bfloat16", {"name": "fedit"}, {}),
        ("bfloat16", {"name": "fedsa-lora"}, {}),
        ("int8", {"name": "fedit"}, {"head": "personal"}),
        ("int8", {"name": "local-only"}, {}),
        ("int8", {"name": "hetlora", "gamma": 0.5, "penalty": 50.0}, {"rank": 4, "client_ranks": [4, 2]}),
        ("int8", {"name": "ravan", "heads": 3, "size": 2, "heads_per_client": 1}, {"rank": 6}),
        ("int8", {"name": "best-rank"}, {"rank": 4, "client_ranks": [1, 4, 2]}),
    ],
    ids=str,
)
def test_every_strategy_resumes_to_the_same_bytes(
    form: str, strategy: dict[str, Any], model: dict[str, Any], recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """What rounding left out is part of what clients keep; nobody is refused; the figure is there and small."""
    long = narrow(recipe_table, form, strategy, model=model)
    setup = prepare(long)
    whole = execute(long, tmp_path / "whole", setup=setup)
    execute(narrow(recipe_table, form, strategy, 2, model=model), tmp_path / "halved", setup=setup)
    execute(long, tmp_path / "halved", resume=True)
    assert weights(tmp_path / "halved") == weights(tmp_path / "whole")
    for record in whole.records:
        assert not record.refused
        nothing = strategy["name"] == "local-only"  # sends no factor
        assert record.error["uplink"] == 0 if nothing else 0 < record.error["uplink"] < 0.05
    last, _ = Journal(tmp_path / "whole", setup.bench.card).recover()
    assert last is not None
    kept = {name.removeprefix(FEEDBACK) for m in last.memories.values() for name in m if name.startswith(FEEDBACK)}
    factors = {name.partition("/")[0] for name in kept} - {"extra"}
    assert bool(factors) == (strategy["name"] not in {*NEW_PAIRS, "local-only"})
    assert any(name.startswith("extra/") for name in kept) == (model.get("head") != "personal")


@pytest.mark.parametrize("form", ["float32", *NARROW])
def test_the_plan_is_what_is_sent(form: str, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = narrow(recipe_table, form, {"name": "fedit"}, 1)
    setup = prepare(recipe)
    promised = plan(recipe, setup)
    (record,) = execute(recipe, tmp_path / "run", setup=setup).records
    assert promised.bytes_up == record.bytes_up
    assert promised.bytes_down == record.bytes_down


def test_the_default_sends_what_it_always_sent(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """float32: the trained tensors themselves, nothing kept, no figure, and the same run with and without the key."""
    recipe = narrow(recipe_table, "float32", {"name": "fedit"}, 2)
    setup = prepare(recipe)
    clients = clients_of(recipe, setup, strategy_of(recipe, sorted(setup.clients)).init(setup.start))
    brief = Brief(1, "client-0", 5, pack(setup.start), False, ["A", "B"], ["A", "B"], setup.start.scalings)
    reply, kept = clients.fit(brief, {})
    assert reply.payload == pack(setup.bench.adapter())
    assert set(reply.metrics) == {"train_loss"}
    assert kept == {}
    execute(recipe, tmp_path / "said", setup=setup)
    table = copy.deepcopy(recipe_table)
    table["federation"] = {"rounds": 2, "clients_per_round": 3}
    table["evaluate"] = {"personal": "never"}
    execute(check(table, "t"), tmp_path / "unsaid")
    assert weights(tmp_path / "said") == weights(tmp_path / "unsaid")


def test_remainders_are_no_tensors_of_the_adapter(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """What the client trains from is what the server sent, whatever remainders lie beside it; they survive the disk."""
    recipe = narrow(recipe_table, "int8", {"name": "fedit"})
    setup = prepare(recipe)
    clients = clients_of(recipe, setup, strategy_of(recipe, sorted(setup.clients)).init(setup.start))
    brief = Brief(1, "client-0", 5, pack(setup.start), False, ["A", "B"], ["A", "B"], setup.start.scalings,
                  uplink="int8", feedback=["A", "B", "core", "extra"])  # fmt: skip
    first, kept = clients.fit(brief, {})
    assert set(kept) == {FEEDBACK + name for name in setup.start.tensors()}
    keep(tmp_path, "run", "client-0", 1, kept)
    back = recall(tmp_path, "run", "client-0", 2)
    assert {n: t.tolist() for n, t in back.items()} == {n: t.tolist() for n, t in kept.items()}
    again, later = clients.fit(brief, back)
    assert again.metrics["train_loss"] == first.metrics["train_loss"], "the remainders were trained on"
    assert again.payload != first.payload, "the remainders were not sent"
    assert any(not torch.equal(later[n], kept[n]) for n in kept)
    adapter, _ = unpack(brief.payload, setup.start, {}, setup.start.scalings)
    assert set(adapter.tensors()) == set(setup.start.tensors())


def test_the_records_figure_is_the_weighted_mean(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = narrow(recipe_table, "int8", {"name": "fedit"}, 1)
    setup = prepare(recipe)
    seen: dict[str, float] = {}
    begun = strategy_of(recipe, sorted(setup.clients)).init(setup.start)
    plain = clients_of(recipe, setup, begun).fit

    def spied(brief: Brief, memory: Any) -> tuple[Reply, Any]:
        reply, kept = plain(brief, memory)
        seen[brief.client] = reply.metrics["uplink_error"]
        return reply, kept

    folder = tmp_path / "run"
    folder.mkdir()
    strategy = strategy_of(recipe, sorted(setup.clients))
    federation = federation_of(recipe, setup, sorted(setup.clients), setup.examples)
    run_rounds(strategy, begun, LocalEngine(spied), federation, Journal(folder, setup.bench.card), lambda event: None)
    (record,) = read_records(folder / "rounds.jsonl")
    assert len(set(record.examples.values())) > 1
    total = sum(record.examples.values())
    mean = sum(seen[client] * n / total for client, n in record.examples.items())
    assert record.error["uplink"] == pytest.approx(mean, rel=1e-12)


def test_sigkill_of_a_run_with_int8_then_resume_gives_the_same_bytes(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = narrow(recipe_table, "int8", {"name": "fedit"}, 8)
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    execute(recipe, tmp_path / "alone")
    command = ("run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "killed"), "--resume")
    for step in (40, 75):  # what clients keep comes back from a checkpoint
        ended = florana(*command, killed_at=(tmp_path / "killed", step))
        assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
    assert 1 < len(read_records(tmp_path / "killed" / "rounds.jsonl")) < 8
    assert florana(*command).returncode == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "alone")


def test_the_report_says_what_the_uplink_added(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    for form in ("float32", "int8"):
        execute(narrow(recipe_table, form, {"name": "fedit"}, 2), tmp_path / form)
    both = [tmp_path / "float32", tmp_path / "int8"]
    page = write_report(both, tmp_path / "r.html").read_text()
    records = read_records(tmp_path / "int8" / "rounds.jsonl")
    assert [row["uplink"] for row in summary(views(both))] == ["float32", "int8"]
    assert [row["uplink_error"] for row in summary(views(both))] == [None, records[-1].error["uplink"]]
    assert "Error of the uplink" in page
    assert "<th>uplink</th><th>uplink error</th>" in page
    assert f"<td>int8</td><td>{records[-1].error['uplink']:.4f}</td>" in page
    alone = write_report(both[1:], tmp_path / "one.html").read_text()
    assert "<dt>Uplink</dt><dd>int8</dd>" in alone
    before = write_report(both[:1], tmp_path / "wide.html").read_text()
    assert "uplink" not in before.lower()
    assert views(both[1:])[0].uplink_errors == [(r.round, r.error["uplink"]) for r in records]


def test_the_centralised_control_sends_nothing_and_rounds_nothing(recipe_table: dict[str, Any]) -> None:
    base = narrow(recipe_table, "int8", {"name": "fedit"})
    table = base.model_dump(exclude_none=True)
    grid._pool(table, base)
    assert table["federation"]["uplink"] == "float32"
