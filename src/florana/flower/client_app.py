"""The ClientApp: hands each message to the resident trainer of its site, or trains here in a simulation.

Flower starts a fresh process for every message of a deployment, so nothing heavy is imported unless it must be.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from florana.flower.frames import Frame, receive, send
from florana.flower.records import from_record, to_record

if TYPE_CHECKING:
    from florana.flower.site import Site
    from florana.recipe import Recipe
    from florana.run import Setup

app = ClientApp()
REPLY_LIMIT = 2**33
"""Bytes of one reply of the site's own trainer."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round of training."""
    return _answer(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """The roll call."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    frame = from_record(message.content)
    node = context.node_config
    if "trainer" in node:
        answer = _ask(str(node["trainer"]), frame)
    elif "partition-id" in node:
        answer = _simulated(context).answer(frame)
    else:
        answer = Frame("failure", {"reason": "it is neither started by 'florana join' nor a node of a simulation"})
    return Message(to_record(answer), reply_to=message)


def _ask(path: str, frame: Frame) -> Frame:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        try:
            channel.connect(path)
            with contextlib.suppress(BrokenPipeError):  # it may have refused before it had read all
                send(channel, frame)
            answer = receive(channel, REPLY_LIMIT)
        except OSError as error:
            return Frame("failure", {"reason": f"its trainer is gone ({error.strerror or type(error).__name__})"})
        except ValueError as error:
            return Frame("failure", {"reason": f"its trainer broke off: {error}"})
    return answer or Frame("failure", {"reason": "its trainer ended while it worked"})


def _simulated(context: Context) -> Site:
    config = tuple(sorted(context.run_config.items()))
    return _site(config, int(context.node_config["partition-id"]))


@functools.lru_cache(maxsize=4096)
def _site(config: tuple[tuple[str, str | int | float | bool], ...], partition: int) -> Site:
    from florana.flower.site import site_of

    setup, recipe, folder = _setup(config)
    names = sorted(setup.clients)
    if partition >= len(names):
        raise ValueError(f"the simulation has more nodes than the {len(names)} clients of the recipe")
    return site_of(recipe, setup, names[partition], folder)


@functools.lru_cache(maxsize=1)
def _setup(config: tuple[tuple[str, str | int | float | bool], ...]) -> tuple[Setup, Recipe, Path]:
    from florana.flower.settings import from_config
    from florana.run import prepare

    recipe, settings = from_config(dict(config))
    return prepare(recipe), recipe, Path(settings.kept or settings.out) / "clients"
