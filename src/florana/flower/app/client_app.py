"""The ClientApp of an exported app: each node of a simulation trains one client. `florana join` runs none."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from florana.flower.app.flower_records import from_record, to_record
from florana.flower.app.frames import Frame

if TYPE_CHECKING:
    from florana.flower.app.site import Site
    from florana.recipe.schema import Recipe
    from florana.runs.prepared import Setup

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round of training."""
    return _answer(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Registration."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    frame = from_record(message.content)
    if "partition-id" in context.node_config:
        answer = _simulated(context).answer(frame)
    else:
        answer = Frame("failure", {"reason": "it is no node of a simulation: sites of a federation run 'florana join'"})
    return Message(to_record(answer), reply_to=message)


def _simulated(context: Context) -> Site:
    config = tuple(sorted(context.run_config.items()))
    return _site(config, int(context.node_config["partition-id"]))


@functools.lru_cache(maxsize=4096)
def _site(config: tuple[tuple[str, str | int | float | bool], ...], partition: int) -> Site:
    from florana.flower.app.site import site_of

    setup, recipe, folder = _setup(config)
    names = sorted(setup.clients)
    if partition >= len(names):
        raise ValueError(f"the simulation has more nodes than the {len(names)} clients of the recipe")
    return site_of(recipe, setup, names[partition], folder)


@functools.lru_cache(maxsize=1)
def _setup(config: tuple[tuple[str, str | int | float | bool], ...]) -> tuple[Setup, Recipe, Path]:
    from florana.flower.app.settings import from_config
    from florana.runs.prepared import prepare

    recipe, settings = from_config(dict(config))
    return prepare(recipe), recipe, Path(settings.kept or settings.out) / "clients"
