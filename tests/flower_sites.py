"""Sites in this process and the server that leads them, over a Grid without a network; updates that are spoilt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.federation.event import Event
from florana.flower.app.frames import Frame
from florana.flower.app.server_app import lead
from florana.flower.app.settings import Settings
from florana.flower.app.site import Site, site_of
from florana.flower.deploy.authority import make_server
from florana.flower.deploy.keys import Certificates
from florana.flower.deploy.roster import Roster, write_roster
from florana.recipe.schema import Recipe
from florana.runs.prepared import prepare
from tests.flower_grid import FakeGrid

_MADE: dict[str, dict[str, Site]] = {}


def sites(recipe: Recipe, folder: Path) -> dict[str, Site]:
    """Every client's site, with its own folder to keep things in; a recipe's model and rows are prepared once."""
    key = recipe.model_dump_json()
    if key not in _MADE:
        setup = prepare(recipe)
        _MADE[key] = {name: site_of(recipe, setup, name, folder) for name in sorted(setup.clients)}
    return {name: replace(site, folder=folder) for name, site in _MADE[key].items()}


def grid_of(members: Mapping[str, Site], **named: Any) -> FakeGrid:
    return FakeGrid({n + 1: (name.encode(), site.answer) for n, (name, site) in enumerate(members.items())}, **named)


def roster_of(members: Mapping[str, Site], folder: Path) -> str:
    files = Certificates(folder / "fed")
    if not files.authority.exists():
        make_server(files.folder, ["localhost"])
    write_roster(files, Roster({name: name.encode() for name in members}))
    return str(files.roster)


def led(recipe: Recipe, grid: FakeGrid, roster: str, out: Path, **named: Any) -> list[Event]:
    events: list[Event] = []
    settings = Settings(**{"out": str(out), "roster": roster, "deadline": 30, "wait": 0.2, "base": False, **named})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("florana.flower.app.flower_engine.time", grid)  # of which the engine takes `monotonic` alone
        lead(grid, recipe, settings, out, events.append)
    return events


FAMILIES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "NaN": lambda reply, t: t["A/m"].view(-1)[0].fill_(math.nan),
    "Inf": lambda reply, t: t["A/m"].view(-1)[0].fill_(math.inf),
    "x1e6": lambda reply, t: t.update({name: tensor * 1e6 for name, tensor in t.items()}),
    "x1e30": lambda reply, t: t.update({name: tensor * 1e30 + 1e30 for name, tensor in t.items()}),
    "wrong rank": lambda reply, t: t.update({"A/m": torch.cat([t["A/m"], t["A/m"]])}),
    "broadcastable shape": lambda reply, t: t.update({"A/m": t["A/m"][:, :1].clone()}),
    "missing module": lambda reply, t: t.clear(),
    "foreign module": lambda reply, t: t.update({"A/evil": t["A/m"].clone()}),
    "zero examples": lambda reply, t: reply.update(examples=0),
    "negative examples": lambda reply, t: reply.update(examples=-5),
    "huge examples": lambda reply, t: reply.update(examples=10**12),
    "NaN examples": lambda reply, t: reply.update(examples=math.nan),
    "wrong round": lambda reply, t: reply.update(round=reply["round"] + 1),
    "another's name": lambda reply, t: reply.update(client="client-0"),
    "oversize": lambda reply, t: t.update({"A/m": torch.zeros(4096, 4096)}),
}


def spoilt(frame: Frame, family: str) -> Frame:
    reply, tensors = dict(frame.fields["reply"]), load(frame.payload)
    first = next(name for name in tensors if not name.startswith("extra/"))  # of A, B or core, what the method sends
    view = {"A/m": tensors.pop(first)}
    FAMILIES[family](reply, view)
    tensors |= {first if n == "A/m" else n: t for n, t in view.items()}
    return Frame("reply", {**frame.fields, "reply": reply}, save({n: t.contiguous() for n, t in tensors.items()}))
