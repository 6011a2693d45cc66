"""Updates lie on the disk before they count: a server that ends within a round asks nobody twice, and holds little."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from florana.errors import FederationError
from florana.federation.event import Event
from florana.federation.journal import Journal
from florana.federation.loop import run_rounds
from florana.federation.messages import Brief, Failure, Reply
from florana.federation.spool import _digest_of
from florana.lora.factors import Contribution
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.setup import execute
from florana.strategy.base import Outcome, State
from tests.federation import CARD, FakeEngine, built, federation, first_adapter, noisy, run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Killed(BaseException):
    """As a kill: nothing catches it."""


def killed_after(count: int, asked: list[str], strategy: str = "fedit") -> Callable[[Brief], Sequence[Reply | Failure]]:
    """Answers so many briefs, and ends the server when the next one is asked."""

    def answer(brief: Brief) -> Sequence[Reply | Failure]:
        if len(asked) == count:
            raise Killed
        asked.append(brief.client)
        return [noisy(brief, strategy)]

    return answer


def same(one: State, other: State) -> bool:
    first, second = one.adapter.tensors(), other.adapter.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("strategy", ["fedit", "flora-na", "fedsa-lora", "fed-sb", "hetlora"])
def test_who_has_answered_is_not_asked_again(strategy: str, count: int, tmp_path: Path) -> None:
    """Killed in the second round, after none, one and two of its three answers."""
    whole = run(tmp_path / "whole", strategy, 3)
    run(tmp_path / "cut", strategy, 1)
    before: list[str] = []
    with pytest.raises(Killed):
        run(tmp_path / "cut", strategy, 3, killed_after(count, before, strategy))
    after: list[str] = []
    told: list[str] = []

    def show(event: Event) -> None:
        if event.kind == "resumed":
            told.append(event.detail)

    def answer(brief: Brief) -> Sequence[Reply | Failure]:
        after.append(brief.client)
        return [noisy(brief, strategy)]

    ended = run(
        tmp_path / "cut", strategy, 3, answer, show=lambda e: told.append(e.detail) if e.kind == "resumed" else None
    )
    assert same(whole, ended)
    assert len(before) == count
    assert len(after) == 6 - count
    assert not set(before) & set(after[: 3 - count])
    assert told == ([f"round 2: {count} of 3 clients had answered before"] if count else [])
    lines = [(tmp_path / name / "rounds.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    drop = ("server_seconds",)
    for one, other in zip(*lines, strict=True):
        first, second = ({k: v for k, v in json.loads(line).items() if k not in drop} for line in (one, other))
        assert first == second
    assert not (tmp_path / "cut" / "spool").exists()


def test_a_quantised_answer_is_kept_as_what_it_became(tmp_path: Path) -> None:
    """Its bytes on the wire are counted as they were, after two kills."""
    fixed = dataclasses.replace(federation(2), uplink="int8")

    def rounds(folder: Path, *counts: int) -> State:
        folder.mkdir()
        strategy = built("fedit")
        asked: list[str] = []
        for count in (*counts, 99):
            engine = FakeEngine(quantised(killed_after(count, asked)))
            try:
                return run_rounds(
                    strategy, strategy.init(first_adapter()), engine, fixed, Journal(folder, CARD), lambda event: None
                )
            except Killed:
                continue
        raise AssertionError

    whole, cut = rounds(tmp_path / "whole"), rounds(tmp_path / "cut", 1, 2)
    assert same(whole, cut)
    up = [
        [json.loads(line)["bytes_up"] for line in (tmp_path / name / "rounds.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert up[0] == up[1]


def quantised(answer: Callable[[Brief], Sequence[Any]]) -> Callable[[Brief], Sequence[Any]]:
    from florana.federation.error_feedback import outgoing
    from florana.federation.messages import unpack, unpack_whole

    def written(brief: Brief) -> Sequence[Any]:
        (reply,) = answer(brief)
        before, _ = unpack(brief.payload, first_adapter(), {}, brief.scalings)
        out = outgoing(unpack_whole(reply.payload, brief.scalings), before, brief, {})
        return [dataclasses.replace(reply, payload=out.content, metrics={"uplink_error": 0.1, "train_loss": 1.0})]

    return written


def damage(folder: Path, how: str) -> None:
    """What may become of a spool, in each of its files in turn."""
    place = sorted(folder.rglob("*.json"))[0]
    facts = json.loads(place.read_text())["facts"]
    tensors = place.with_suffix(".safetensors")
    if how == "a flipped bit":
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(bytes(content))
    elif how == "cut off":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif how == "gone":
        tensors.unlink()
    elif how == "no memory":
        place.with_suffix(".memory").unlink()
    elif how == "half a fact":
        place.write_text(place.read_text()[:40])
    elif how == "no facts":
        place.write_text("[]")
    elif how == "another question":
        signed(place, {**facts, "asked": "0" * 64})
    elif how == "senseless rows":
        signed(place, {**facts, "examples": -3})
    else:
        place.write_text(json.dumps({"facts": {**facts, how: None}, "sha256": "0"}))


def signed(place: Path, facts: dict[str, Any]) -> None:
    place.write_text(json.dumps({"facts": facts, "sha256": _digest_of(facts)}))


@pytest.mark.parametrize(
    "how",
    ["a flipped bit", "cut off", "gone", "no memory", "half a fact", "no facts", "another question", "senseless rows",
     "sha256", "metrics", "bytes_up", "seconds"],
)  # fmt: skip
def test_what_is_damaged_is_asked_for_again(how: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "fedsa-lora", 1)
    with pytest.raises(Killed):
        run(tmp_path / "cut", "fedsa-lora", 1, killed_after(2, [], "fedsa-lora"))
    damage(tmp_path / "cut" / "spool" / "round-000001", how)
    asked: list[str] = []
    ended = run(tmp_path / "cut", "fedsa-lora", 1, killed_after(9, asked, "fedsa-lora"))
    assert len(asked) == 2
    assert same(whole, ended)


def test_a_spool_of_another_run_is_not_believed(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "other", "flora-na", 1, killed_after(2, [], "flora-na"))
    whole = run(tmp_path / "whole", "fedit", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "other" / "spool").rename(tmp_path / "run" / "spool")
    for path in (tmp_path / "run" / "spool").rglob("*.json"):  # of another seed, say
        facts = json.loads(path.read_text())["facts"]
        signed(path, {**facts, "asked": facts["asked"][::-1]})
    asked: list[str] = []
    assert same(whole, run(tmp_path / "run", "fedit", 1, killed_after(9, asked)))
    assert len(asked) == 3


def test_a_full_disk_ends_the_round_and_nothing_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run", "fedit", 1)
    plain = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "spool" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return plain(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FederationError, match=r"the update of client 'client-\d' could not be kept") as caught:
        run(tmp_path / "run", "fedit", 3)
    assert "free some disk space" in str(caught.value)
    monkeypatch.undo()
    assert same(run(tmp_path / "run", "fedit", 3), run(tmp_path / "whole", "fedit", 3))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's list of mappings")
def test_a_rule_reads_the_updates_from_the_disk(tmp_path: Path) -> None:
    """No update's tensors are in the server's own memory: each lies within a mapping of its file."""
    strategy = built("flora-na")
    seen: list[bool] = []

    def watched(state: State, parts: Sequence[Contribution]) -> Outcome:
        ranges = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "/spool/round-" in line:
                low, _, high = line.split()[0].partition("-")
                ranges.append((int(low, 16), int(high, 16)))
        for part in parts:
            for pair in part.adapter.modules.values():
                seen.extend(any(low <= t.data_ptr() < high for low, high in ranges) for t in (pair.A, pair.B))
        return strategy.step(state, parts)

    (tmp_path / "run").mkdir()
    engine = FakeEngine(lambda brief: [noisy(brief, "flora-na")])
    run_rounds(
        dataclasses.replace(strategy, step=watched),
        strategy.init(first_adapter()),
        engine,
        federation(1),
        Journal(tmp_path / "run", CARD),
        lambda event: None,
    )
    assert seen
    assert all(seen)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("fedsa-lora", {"engine": {"cohort": 2}}),
        ("fedsa-lora", {}),
        ("best-rank", {"federation": {"rounds": 2, "uplink": "int8"}}),
    ],
)
def test_a_killed_run_trains_the_others_alone(
    strategy: str, changes: dict[str, Any], recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """In the second round of four clients, in the middle of the third one's steps: two go on, with what they kept."""
    table = {**recipe_table, "strategy": {"name": strategy}, "federation": {"rounds": 2}, **changes}
    recipe: Recipe = check(table, "t")
    execute(recipe, tmp_path / "whole")
    steps: list[str] = []

    def step(client: str) -> None:
        steps.append(client)
        if len(steps) == 4 * 3 + 2 * 3 + 1:
            raise Killed

    told: list[str] = []

    def show(event: Event) -> None:
        if event.kind == "resumed":
            told.append(event.detail)

    with pytest.raises(Killed):
        execute(recipe, tmp_path / "cut", step=step)
    again: list[str] = []
    execute(recipe, tmp_path / "cut", resume=True, step=again.append, show=show)
    assert sorted(set(again)) == ["client-2", "client-3"]
    assert told == ["round 2: 2 of 4 clients had answered before"]
    for part in ("adapter/adapter_model.safetensors", "checkpoint/round-000002/clients.safetensors"):
        assert (tmp_path / "whole" / part).read_bytes() == (tmp_path / "cut" / part).read_bytes()
