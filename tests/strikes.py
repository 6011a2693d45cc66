"""SIGKILL at a step instead of a time: a process ends itself at a given one of the steps it takes in a folder.

Python tells an audit hook of every file that is opened, renamed or removed, and of every socket that is connected. The
standard library alone: the text of this file also becomes the `sitecustomize` of other programs.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "socket.connect")


def strike(folder: str, step: int, told: str, committing: bool = True) -> None:
    """From now on, end this process at its `step`-th step below `folder`, which is then written to the file `told`.

    Args:
        committing: the first step is the first one of a commit, the folder of a checkpoint.
    """
    steps: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or len(steps) >= step:
            return
        place = arguments[1] if event == "socket.connect" else arguments[0]
        if not isinstance(place, str | bytes | os.PathLike):
            return
        path = os.fsdecode(place)
        if not path.startswith(folder):
            return
        if committing and not steps and not (event == "os.mkdir" and path.endswith(".tmp")):
            return
        if event == "open" and (path.endswith(".lock") or "progress" in path):
            return
        steps.append(event + " " + path[len(folder) :])
        if len(steps) == step:
            Path(told).write_text("\n".join(steps))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
