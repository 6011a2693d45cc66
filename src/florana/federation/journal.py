"""The journal of a run: a round is committed whole or not at all, and a killed run continues from its last round.

    RUN/checkpoint/round-000007/   state.safetensors, clients.safetensors, state.json (digests, and the round's record)
    RUN/rounds.jsonl               the records, one line each
    RUN/adapter/                   the global adapter, as PEFT loads it

A round is committed by one rename, of its finished and flushed checkpoint folder. What follows it (the line in
rounds.jsonl, the adapter folder, removing older checkpoints) is repeated from the checkpoint when a run resumes, so a
kill between any two steps loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from florana.adapters.adapter_folder import AdapterCard, write_adapter
from florana.aggregate.stack import combined
from florana.atomic_files import explained, replace_file, sync_folder
from florana.bounded import json_of
from florana.errors import InputError
from florana.federation.best import best_round
from florana.federation.round_record import RoundRecord, record_from_json
from florana.lora.factors import Adapter, adapter_from_tensors
from florana.strategy.base import State

KEPT_CHECKPOINTS = 2
"""The last round and the one before it, should the last one be damaged later on."""


@dataclass(frozen=True, eq=False)
class Committed:
    """A round as it was committed: the state after it, its record, and the client state.

    Args:
        state: the state after the round.
        record: what happened in it.
        memories: client -> its client state.
    """

    state: State
    record: RoundRecord
    memories: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Journal:
    """The journal in a run folder.

    Args:
        folder: RUN, which exists.
        card: what the exported adapter folder says of itself.
        keep_by: the figure on the validation rows by which the adapter of the best round is kept; None keeps the last.
    """

    folder: Path
    card: AdapterCard
    keep_by: str | None = None

    def commit(
        self, state: State, record: RoundRecord, memories: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Make the round permanent. Raises FederationError when the disk refuses; earlier rounds stay as they were."""
        final = self._checkpoint(state.round)
        temporary = final.with_name(final.name + ".tmp")
        with explained(self.folder, f"round {state.round} could not be saved"):
            self.folder.stat()  # one that was moved away or removed is not begun anew in the middle of a run
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                _write_checkpoint(temporary, Committed(state, record, memories or {}))
                temporary.replace(final)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_folder(final.parent)
            _append_line(self.folder / "rounds.jsonl", record)
            kept = self._kept(state.round)
            if kept == state.round:
                self.export(state)
            for round_ in self._rounds()[:-KEPT_CHECKPOINTS]:
                if round_ != kept:
                    shutil.rmtree(self._checkpoint(round_))

    def export(self, state: State) -> None:
        """Write the state's adapter (joined with its residual) where PEFT loads it."""
        write_adapter(self.folder / "adapter", combined(state.adapter, state.residual), self.card)

    def _kept(self, last: int) -> int:
        """The round whose adapter is kept: the last one, or the best so far (before one is measured, the last)."""
        if self.keep_by is None:
            return last
        return best_round(read_records(self.folder / "rounds.jsonl"), self.keep_by) or last

    def kept(self) -> Adapter:
        """The adapter that adapter/ holds, from its checkpoint: joined with its residual. Raises InputError."""
        state = _read_checkpoint(self._checkpoint(self._kept(self._rounds()[-1]))).state
        return combined(state.adapter, state.residual)

    def recover(self) -> tuple[Committed | None, list[str]]:
        """The last round whose checkpoint is whole, with rounds.jsonl and adapter/ brought in line with it.

        Returns:
            The round, or None when none was committed, and what had to be repaired, in words.
        """
        repaired: list[str] = []
        with explained(self.folder, "the run could not be brought in order"):
            for leftover in sorted((self.folder / "checkpoint").glob("*.tmp")):
                shutil.rmtree(leftover)
        for round_ in reversed(self._rounds()):
            try:
                last = _read_checkpoint(self._checkpoint(round_))
            except InputError as error:
                repaired.append(f"the checkpoint of round {round_} is damaged and was set aside: {error.why}")
                damaged = self._checkpoint(round_)
                with explained(self.folder, "the run could not be brought in order"):
                    damaged.replace(damaged.with_name(damaged.name + ".damaged"))
                continue
            with explained(self.folder, "the run could not be brought in order"):
                repaired += self._mend_rounds(last.record)
                repaired += self._export_kept(last)
            return last, repaired
        if read_records(self.folder / "rounds.jsonl"):
            raise InputError(
                f"{self.folder}: no checkpoint can be read, though rounds were committed",
                why="; ".join(repaired) or "the folder checkpoint/ is empty",
                fix="adapter/ still holds the last adapter; start the run anew in another folder",
            )
        return None, repaired

    def _export_kept(self, last: Committed) -> list[str]:
        """Bring adapter/ in line with the round that is kept; what could not be, in words."""
        kept = self._kept(last.state.round)
        if kept == last.state.round:
            self.export(last.state)
            return []
        try:
            self.export(_read_checkpoint(self._checkpoint(kept)).state)
        except InputError as error:
            return [f"the checkpoint of the best round, {kept}, is damaged; adapter/ stays as it is: {error.why}"]
        return []

    def _mend_rounds(self, last: RoundRecord) -> list[str]:
        path = self.folder / "rounds.jsonl"
        records = [r for r in read_records(path) if r.round < last.round]
        if [r.round for r in records] != list(range(1, last.round)):
            raise InputError(
                f"{path} does not hold rounds 1 to {last.round - 1}, which came before the last checkpoint",
                fix="restore the file from a copy, or start the run anew in another folder",
            )
        lines = "".join(_line(record) for record in [*records, last]).encode()
        if path.exists() and path.read_bytes() == lines:
            return []
        replace_file(path, lines)
        return [f"rounds.jsonl was brought in line with the checkpoint of round {last.round}"]

    def _checkpoint(self, round_: int) -> Path:
        return self.folder / "checkpoint" / f"round-{round_:06d}"

    def _rounds(self) -> list[int]:
        names = [path.name for path in (self.folder / "checkpoint").glob("round-??????") if path.is_dir()]
        return sorted(int(name.removeprefix("round-")) for name in names)


def read_records(path: Path) -> list[RoundRecord]:
    """The whole lines of a rounds.jsonl; a torn last line is left out.

    Raises:
        InputError: a line before the last one cannot be read; the message names it.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[RoundRecord] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(record_from_json(json_of(line)))
        except (ValueError, TypeError) as error:
            if number >= len(lines) - 1:
                break
            raise InputError(f"{path}, line {number} cannot be read", why=str(error)) from None
    return records


def first_rows(records: Sequence[RoundRecord]) -> dict[str, int]:
    """Client -> the training rows it had in the first of these rounds that counted it."""
    found: dict[str, int] = {}
    for record in records:
        found = {**record.examples, **found}
    return found


def _write_checkpoint(folder: Path, round_: Committed) -> None:
    state = round_.state
    tensors = {f"adapter/{name}": t for name, t in state.adapter.tensors().items()}
    if state.residual is not None:
        tensors |= {f"residual/{name}": t for name, t in state.residual.tensors().items()}
    tensors |= {f"memory/{name}": t for name, t in state.memory.items()}
    clients = {f"{client}/{name}": t for client, kept in round_.memories.items() for name, t in kept.items()}
    files = {"state.safetensors": tensors, "clients.safetensors": clients}
    facts: dict[str, Any] = {
        "round": state.round,
        "scalings": state.adapter.scalings,
        "residual_scalings": state.residual.scalings if state.residual is not None else {},
        "record": _json_safe(round_.record.to_json()),
        "sha256": {},
    }
    for name, content in files.items():
        data = save({key: tensor.contiguous() for key, tensor in content.items()})
        facts["sha256"][name] = hashlib.sha256(data).hexdigest()
        replace_file(folder / name, data)
    body = json.dumps(facts)
    facts["sha256"]["state.json"] = hashlib.sha256(body.encode()).hexdigest()
    replace_file(folder / "state.json", json.dumps(facts).encode())


def _read_checkpoint(folder: Path) -> Committed:
    try:
        facts = json_of((folder / "state.json").read_bytes())
        own = facts["sha256"].pop("state.json")
        if hashlib.sha256(json.dumps(facts).encode()).hexdigest() != own:
            raise ValueError("state.json does not have the digest it was written with")
        content: dict[str, dict[str, Tensor]] = {}
        for name, digest in facts["sha256"].items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"{name} does not have the digest it was written with")
            content[name] = load(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read", why=str(error)) from None
    tensors, scalings = content["state.safetensors"], facts["scalings"]

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    kept = facts.get("residual_scalings", scalings)  # checkpoints of the first version have one table for both
    residual: Adapter | None = adapter_from_tensors(part("residual/"), kept) if part("residual/") else None
    state = State(facts["round"], adapter_from_tensors(part("adapter/"), scalings), residual, part("memory/"))
    memories: dict[str, dict[str, Tensor]] = {}
    for key, tensor in content["clients.safetensors"].items():
        client, _, name = key.partition("/")
        memories.setdefault(client, {})[name] = tensor
    return Committed(state, record_from_json(facts["record"]), memories)


def _line(record: RoundRecord) -> str:
    return json.dumps(_json_safe(record.to_json()), allow_nan=False) + "\n"


def _json_safe(value: Any) -> Any:
    """JSON knows no NaN and no infinity: a score that is not finite is written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return value


def _append_line(path: Path, record: RoundRecord) -> None:
    with path.open("ab") as stream:
        stream.write(_line(record).encode())
        stream.flush()
        os.fsync(stream.fileno())
