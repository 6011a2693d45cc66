"""Clients of one machine side by side: forked processes, one thread each, over one copy of everything that is loaded.

    this process                                   a worker, forked at the start of the round
    number of the next client        ---->         trains it, on pages of memory that it shares until it writes
    a step, the answer, or an error  <----

Forked anew in each round, a worker has what this process has: the model, the rows, the broadcast. It keeps nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import safetensors.torch
import torch

from florana.displayable import log
from florana.errors import BudgetSpent, FloranaError, InputError
from florana.federation.local_engine import Asked, Fit, Outcome

Step = Callable[[str], None]
"""Told of every optimizer step, by the client's name."""


def side_by_side(
    workers: int, fit_with: Callable[[Step], Fit], step: Step, asked: Sequence[Asked]
) -> Generator[Outcome, None, None]:
    """Every client's outcome, in the order in which they are asked, whichever is done first.

    Args:
        workers: processes at once.
        fit_with: makes what trains a client, given what is told of its steps.
        step: told of every step, in this process.
        asked: a brief and the client's memory, of each client.
    """
    found: dict[int, Outcome] = {}
    todo, given = list(range(len(asked)))[::-1], dict[Connection, int]()
    crew = [_begun(fit_with, asked, given) for _ in range(min(workers, len(asked)))]
    try:
        for number in range(len(asked)):
            while number not in found:
                for line in wait(list(given)):
                    assert isinstance(line, Connection)
                    _hear(line, given, todo, found, step)
                if not given:
                    lost = RuntimeError("the processes that train ended by themselves: is there memory for so many?")
                    found = {**dict.fromkeys(range(len(asked)), lost), **found}
            yield found.pop(number)
    finally:
        for line in given:
            line.close()
        for process in crew:
            process.terminate()
            process.join()


def require_forks() -> None:
    """Raise InputError where a process that has trained cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise InputError("engine.workers needs a system that can fork processes", fix="set engine.workers = 1")
    if torch.cuda.is_available():
        raise InputError(
            "engine.workers does not go with a CUDA device in the machine",
            why="PyTorch cannot train in a forked process where it has one",
            fix="hide it (CUDA_VISIBLE_DEVICES=''), or set engine.workers = 1",
        )


def _hear(
    line: Connection, given: dict[Connection, int], todo: list[int], found: dict[int, Outcome], step: Step
) -> None:
    """One message of a worker: it is ready for the next client, made a step, or is done with a client."""
    try:
        kind, *content = line.recv()
    except (EOFError, OSError):
        number = given.pop(line)
        if number >= 0:
            found[number] = RuntimeError("the process that trained it ended by itself: is there memory for so many?")
        return
    if kind == "step":
        step(*content)
        return
    if kind != "ready":
        found[given[line]] = _outcome(kind, content)
    del given[line]
    if not todo:
        line.close()
        return
    with contextlib.suppress(OSError):  # it died meanwhile: the client waits for another
        line.send(todo[-1])
        given[line] = todo.pop()


def _outcome(kind: str, content: list[Any]) -> Outcome:
    if kind == "done":
        reply, memory = content
        return reply, safetensors.torch.load(memory)
    if kind == "failed":
        return FloranaError(content[0])
    if kind == "spent":
        return BudgetSpent(content[0])
    error = RuntimeError(content[0])
    error.add_note(content[1])
    return error


def _begun(
    fit_with: Callable[[Step], Fit], asked: Sequence[Asked], given: dict[Connection, int]
) -> multiprocessing.Process:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_work, args=(there, fit_with, asked), daemon=True)
    with warnings.catch_warnings():  # other threads of this process only draw and wait
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
        process.start()
    there.close()
    given[here] = -1
    return process  # type: ignore[return-value]


def _work(line: Connection, fit_with: Callable[[Step], Fit], asked: Sequence[Asked]) -> None:
    """A worker's life: one client after the other, until there is none or nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who was interrupted ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _close_but(line.fileno())
    torch.set_num_threads(1)
    fit = fit_with(functools.partial(_stepped, line))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        line.send(("ready",))
        while True:
            brief, memory = asked[line.recv()]
            try:
                reply, kept = fit(brief, memory)
            except FloranaError as error:
                line.send(("spent" if isinstance(error, BudgetSpent) else "failed", str(error)))
            except BrokenPipeError:
                raise  # nobody listens
            except Exception as error:
                line.send(("broken", f"{type(error).__name__}: {error}", traceback.format_exc()))
            else:
                whole = {name: tensor.detach().clone().contiguous() for name, tensor in kept.items()}
                line.send(("done", reply, safetensors.torch.save(whole)))


def _stepped(line: Connection, client: str) -> None:
    line.send(("step", client))


def _close_but(own: int) -> None:
    """Close what this process inherited: a lock that it held would outlive the run that took it."""
    streams = [getattr(handler, "stream", None) for handler in (*log.handlers, *logging.getLogger().handlers)]
    kept = {0, 1, 2, own}
    for stream in streams:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            kept.add(stream.fileno())  # type: ignore[union-attr]
    ends = [*sorted(kept), os.sysconf("SC_OPEN_MAX")]
    for low, high in itertools.pairwise(ends):
        os.closerange(low + 1, high)
