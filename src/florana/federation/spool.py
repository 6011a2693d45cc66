"""The updates of the round that is running, on the disk before they count: RUN/spool/round-000007/.

    reply -> gate -> trip-0/<name>.safetensors (what travelled, as float32), <name>.json (who, figures, digests)
    server killed -> begun anew -> the same briefs -> those whose answers lie here are not asked again

An update that was kept is read through a memory map: its pages come from the disk when a rule reaches its module, and
go when memory is wanted, so the number of clients is no number of adapters in memory. A damaged file, or one that
answers another brief, is removed and its client asked again; so nothing here is flushed beyond the system's own cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from florana.adapters.safetensors_io import map_tensors
from florana.atomic_files import explained
from florana.bounded import json_of
from florana.federation.messages import Brief, Reply
from florana.strategy.base import Named

FOLDER = "spool"


@dataclass(frozen=True, eq=False)
class Kept:
    """An answer that was there when the round was begun anew.

    Args:
        reply: the client's, its payload the tensors of the update as float32, checked once and to be checked again.
        bytes_up: what it had sent, in bytes.
        memory: what the client had kept, where the engine holds it.
    """

    reply: Reply
    bytes_up: int
    memory: Mapping[str, Tensor] | None


class Spool:
    """The answers of one round.

    Args:
        run: RUN, which exists.
        round_: the round's number.
        trip: of a method that works on sums, whose answers these are.
    """

    def __init__(self, run: Path, round_: int, trip: int = 0) -> None:
        self._run, self._folder = run, run / FOLDER / f"round-{round_:06d}" / f"trip-{trip}"
        self._asked: dict[str, str] = {}
        self._payloads: dict[int, str] = {}

    def keep(self, brief: Brief, reply: Reply, tensors: Named, memory: Named | None) -> Named:
        """Write down an update that the gate let through; returns its tensors, left on the disk.

        Args:
            brief: what the client was asked.
            reply: its answer.
            tensors: what the gate made of the answer's tensors, as float32.
            memory: what the client keeps now, where the engine holds it.

        Raises:
            FederationError: the disk refuses; the rounds before this one stand.
        """
        place = self._place(brief.client)
        facts: dict[str, Any] = {
            "client": brief.client,
            "asked": self._digest(brief),
            "examples": reply.examples,
            "metrics": dict(reply.metrics),
            "seconds": reply.seconds,
            "bytes_up": len(reply.payload),
            "sha256": {},
        }
        contents = {".safetensors": dict(tensors)}
        if memory is not None:
            contents[".memory"] = dict(memory)
        with explained(self._run, f"the update of client '{brief.client}' could not be kept"):
            self._run.stat()  # one that was moved away is not begun anew
            self._folder.mkdir(parents=True, exist_ok=True)
            for ending, content in contents.items():
                data = save({name: tensor.contiguous() for name, tensor in content.items()})
                facts["sha256"][ending] = hashlib.sha256(data).hexdigest()
                place.with_suffix(ending).write_bytes(data)
            part = place.with_suffix(".tmp")
            part.write_text(json.dumps({"facts": facts, "sha256": _digest_of(facts)}))
            part.replace(place.with_suffix(".json"))  # last: what it names is there
            return self.left(brief.client)

    def left(self, client: str) -> Named:
        """The tensors that are kept of a client's answer, left on the disk."""
        return map_tensors(self._place(client).with_suffix(".safetensors"))

    def kept(self, brief: Brief) -> Kept | None:
        """The answer to this very brief, where it is here and whole."""
        place = self._place(brief.client)
        if not place.with_suffix(".json").exists():
            return None
        try:
            told = json_of(place.with_suffix(".json").read_bytes())
            facts: dict[str, Any] = told["facts"]
            contents = {ending: place.with_suffix(ending).read_bytes() for ending in facts["sha256"]}
            whole = all(
                hashlib.sha256(content).hexdigest() == facts["sha256"][ending] for ending, content in contents.items()
            )
            if whole and told["sha256"] == _digest_of(facts) and facts["asked"] == self._digest(brief):
                reply = Reply(
                    client=brief.client,
                    round=brief.round,
                    examples=facts["examples"],
                    metrics=facts["metrics"],
                    payload=contents[".safetensors"],
                    seconds=facts["seconds"],
                )
                memory = load(contents[".memory"]) if ".memory" in contents else None
                return Kept(reply, facts["bytes_up"], memory)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            pass  # damaged: asked again
        self.drop(brief.client)
        return None

    def drop(self, client: str) -> None:
        """Remove what is kept of a client's answer."""
        for ending in (".json", ".safetensors", ".memory", ".tmp"):
            with contextlib.suppress(OSError):
                self._place(client).with_suffix(ending).unlink()

    def remove(self) -> None:
        """Remove the spool: the round is committed, or another one is."""
        shutil.rmtree(self._run / FOLDER, ignore_errors=True)

    def _place(self, client: str) -> Path:
        return self._folder / hashlib.sha256(client.encode()).hexdigest()[:24]

    def _digest(self, brief: Brief) -> str:
        """Of all that a brief says: an answer to another one is no answer to this."""
        if brief.client not in self._asked:
            payload = self._payloads.setdefault(id(brief.payload), hashlib.sha256(brief.payload).hexdigest())
            said = {**asdict(replace(brief, payload=b"")), "payload": payload}
            self._asked[brief.client] = _digest_of({name: _plain(value) for name, value in said.items()})
        return self._asked[brief.client]


def _digest_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(sorted(value.items()))
    return sorted(value) if isinstance(value, list | tuple | set | frozenset) else value
