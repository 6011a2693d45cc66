"""The journal: what was committed is never lost, by a full disk, a damaged file, or a kill at any moment."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest
import torch

from florana.errors import FederationError, InputError
from florana.federation.journal import Journal, read_records
from florana.strategy import STRATEGIES
from tests.federation import CARD, VARIANTS, run
from tests.program import struck


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("strategy", [*STRATEGIES, *VARIANTS])
def test_a_run_in_two_sittings_is_the_run_in_one(strategy: str, tmp_path: Path) -> None:
    run(tmp_path / "one", strategy, 5)
    run(tmp_path / "two", strategy, 2)
    run(tmp_path / "two", strategy, 5)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert len(read_records(tmp_path / "two" / "rounds.jsonl")) == 5


def test_memories_of_clients_are_committed_with_the_round(tmp_path: Path) -> None:
    run(tmp_path, "fedit", 4)
    last, repaired = Journal(tmp_path, CARD).recover()
    assert last is not None
    assert repaired == []
    asked = [record.clients for record in read_records(tmp_path / "rounds.jsonl")]
    for client, memory in last.memories.items():
        assert float(memory["rounds"]) == sum(client in clients for clients in asked)


def test_a_torn_last_line_is_mended_from_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, "fedit", 3)
    path = tmp_path / "rounds.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    last, repaired = Journal(tmp_path, CARD).recover()
    assert last is not None
    assert last.state.round == 3
    assert len(repaired) == 1
    assert path.read_bytes() == whole


def test_a_damaged_checkpoint_is_set_aside_and_its_round_done_again(tmp_path: Path) -> None:
    run(tmp_path / "clean", "best-rank", 4)
    run(tmp_path / "hurt", "best-rank", 3)
    target = tmp_path / "hurt" / "checkpoint" / "round-000003" / "state.safetensors"
    content = bytearray(target.read_bytes())
    content[-3] ^= 1
    target.write_bytes(bytes(content))
    last, repaired = Journal(tmp_path / "hurt", CARD).recover()
    assert last is not None
    assert last.state.round == 2
    assert "round 3 is damaged" in repaired[0]
    run(tmp_path / "hurt", "best-rank", 4)
    assert digest(tmp_path / "hurt") == digest(tmp_path / "clean")


@pytest.mark.parametrize("victim", ["state.safetensors", "clients.safetensors", "state.json"])
def test_every_flipped_byte_of_a_checkpoint_is_noticed(victim: str, tmp_path: Path) -> None:
    run(tmp_path, "fedit", 2)
    path = tmp_path / "checkpoint" / "round-000002" / victim
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 40):
        changed = bytearray(whole)
        changed[place] ^= 0x20
        path.write_bytes(bytes(changed))
        last, repaired = Journal(tmp_path, CARD).recover()
        assert last is not None
        assert last.state.round == 1, place
        assert repaired
        damaged = path.parent.with_name(path.parent.name + ".damaged")
        damaged.rename(path.parent)
        (tmp_path / "rounds.jsonl").unlink()
        path.write_bytes(whole)
        run(tmp_path / "again", "fedit", 2)
        (tmp_path / "rounds.jsonl").write_bytes((tmp_path / "again" / "rounds.jsonl").read_bytes())


def test_a_lost_line_before_the_checkpoint_is_an_error_not_a_guess(tmp_path: Path) -> None:
    run(tmp_path, "fedit", 3)
    path = tmp_path / "rounds.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(InputError, match="does not hold rounds 1 to 2"):
        Journal(tmp_path, CARD).recover()
    path.write_bytes(b"{broken\n" + b"".join(lines[1:]))
    with pytest.raises(InputError, match="line 1"):
        Journal(tmp_path, CARD).recover()


def test_no_readable_checkpoint_is_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    run(tmp_path, "fedit", 2)
    for path in (tmp_path / "checkpoint").glob("*/state.json"):
        path.write_text("{}")
    before = (tmp_path / "rounds.jsonl").read_bytes()
    with pytest.raises(InputError, match="no checkpoint can be read"):
        run(tmp_path, "fedit", 3)
    assert (tmp_path / "rounds.jsonl").read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_the_round_before(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of a commit fails once: the error is clear, and the run goes on from what was committed."""
    run(tmp_path / "clean", "fedit", 3)
    real = os.fsync
    for failing in range(12):
        folder = tmp_path / f"fails-{failing}"
        run(folder, "fedit", 1)
        calls = iter(range(10**6))

        def refuse(handle: int, calls: object = calls, failing: int = failing) -> None:
            if next(calls) == failing:  # type: ignore[call-overload]
                raise OSError(code, os.strerror(code))
            real(handle)

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(FederationError) as caught:
            run(folder, "fedit", 3)
        monkeypatch.setattr(os, "fsync", real)
        assert caught.value.exit_code == 4
        assert os.strerror(code) in str(caught.value)
        assert "fix:" in str(caught.value)
        last, _ = Journal(folder, CARD).recover()
        assert last is not None
        run(folder, "fedit", 3)
        assert digest(folder) == digest(tmp_path / "clean")


def test_a_run_folder_that_was_moved_away_is_not_begun_anew(tmp_path: Path) -> None:
    run(tmp_path / "run", "fedit", 2)
    journal = Journal(tmp_path / "run", CARD)
    last, _ = journal.recover()
    assert last is not None
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(FederationError, match="round 2 could not be saved"):
        journal.commit(last.state, last.record)
    assert not (tmp_path / "run").exists()


def test_sigkill_at_every_step_of_a_commit_loses_no_committed_round(tmp_path: Path) -> None:
    """A real process, killed again and again while it works; the end is the same bytes as of a run left alone."""
    rounds, folder, seen = 40, tmp_path / "killed", 0
    run(tmp_path / "alone", "flora-na", rounds)
    for step in range(1, 31):  # of a commit and the beginning of the next
        assert struck(run, (folder, "flora-na", rounds), folder, step)
        committed = len(read_records(folder / "rounds.jsonl"))
        assert committed >= seen, "a committed round was lost"
        seen = committed
    assert 0 < seen < rounds
    run(folder, "flora-na", rounds)
    assert digest(folder) == digest(tmp_path / "alone")
    plain = [_timeless(record.to_json()) for record in read_records(folder / "rounds.jsonl")]
    assert plain == [_timeless(record.to_json()) for record in read_records(tmp_path / "alone" / "rounds.jsonl")]


def _timeless(record: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in record.items() if name != "server_seconds"}


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, "oracle", 6)
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["round-000005", "round-000006"]


def test_the_oracles_frozen_part_survives_a_restart(tmp_path: Path) -> None:
    state = run(tmp_path, "oracle", 3)
    last, _ = Journal(tmp_path, CARD).recover()
    assert last is not None
    assert state.residual is not None
    assert last.state.residual is not None
    for name, tensor in state.residual.tensors().items():
        assert torch.equal(tensor, last.state.residual.tensors()[name])
