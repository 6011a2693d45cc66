"""Work of a study in processes beside one another, as many as there are cores and memory for.

They end with the process that began them, however it ends: what a killed study left half done, the next one goes on
with, and would find its run folders in use.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from queue import Empty
from typing import Any, TypeVar

from florana.errors import FederationError

MEMORY_PER_JOB = 2 * 2**30
"""Bytes of free memory a group of cells should have before another one starts beside it."""

Item = TypeVar("Item")
Done = TypeVar("Done")


def in_jobs(
    do: Callable[[Item, Callable[[str], Any]], Done],
    items: Sequence[Item],
    jobs: int | None,
    advance: Callable[[int, str], None],
) -> list[Done]:
    """`do` for each item, in processes beside one another where there are several; the results in the items' order.

    Args:
        do: given an item, and whom to tell of each committed round.
        items: what is to be done.
        jobs: how many at once; None: by cores and memory.
        advance: told of committed rounds (how many, of what).

    Raises:
        FederationError: a process ended by itself, which happens where memory runs out.
    """
    count = min(jobs or default_jobs(), len(items))
    if count <= 1:
        return [do(item, lambda name: advance(1, name)) for item in items]
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(end_with_parent)
    with manager, ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent) as pool:
        events = manager.Queue()
        futures = [pool.submit(do, item, events.put) for item in items]
        while not all(future.done() for future in futures):
            with contextlib.suppress(Empty):
                advance(1, events.get(timeout=0.5))
        while True:
            try:
                advance(1, events.get(block=False))
            except Empty:
                break
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise FederationError(
                "a process of the study ended by itself",
                why="somebody ended it, or there was no memory for so many at once",
                fix="the same command with --jobs 1 goes on; what is finished is kept",
            ) from None


def default_jobs() -> int:
    """As many groups at once as there are cores, and memory for."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1
    return max(1, min(os.cpu_count() or 1, free // MEMORY_PER_JOB))


def end_with_parent() -> None:
    """From now on this process ends as soon as the one that began it has: a commit is one rename, nothing is lost."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process that multiprocessing began"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
