"""Files that are written whole or not at all, and what to say when the disk refuses."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from florana.errors import FederationError


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, flush it to the disk, and move it over `path` in one step."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    replace_by(path, write)


def replace_by(path: Path, write: Callable[[Path], None]) -> None:
    """As `replace_file`, with a function that writes the temporary file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def without_torn_line(path: Path) -> None:
    """Take off a last line that a kill or a full disk left without its end: what it was to say was never said.

    Lines that are only added, each flushed before anybody is told, would else be glued to it.

    Args:
        path: the file, which need not exist.
    """
    if not path.exists():
        return
    with path.open("r+b") as stream:
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            stream.truncate(whole)
            os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries (renames) to the disk, where the system can."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


AGAIN = "start again (run and serve with --resume)"


def refused(error: OSError, what: str, folder: Path | None = None, again: str = AGAIN) -> FederationError:
    """An error of the file system as one that says which file, why, and what to do.

    Args:
        error: the system's.
        what: what could not be done, as the message begins.
        folder: where it was written, whose free space is told.
        again: how to go on when the disk is mended.
    """
    free = shutil.disk_usage(folder).free // 2**20 if folder is not None and folder.exists() else 0
    left = f" ({free} MiB are left there)" if folder is not None else ""
    fixes = {
        errno.ENOSPC: f"free some disk space{left} and {again}",
        errno.EDQUOT: f"free some of your share of the disk and {again}",
        errno.EROFS: f"the disk is read-only: mount it for writing and {again}, or name another folder",
        errno.EACCES: f"give yourself the right to write there and {again}, or name another folder",
    }
    return FederationError(
        f"{what}: {error.filename or folder}" if error.filename or folder else what,
        why=error.strerror or str(error),
        fix=fixes.get(error.errno or 0, f"mend the disk and {again}; what was written before is whole"),
    )


@contextmanager
def explained(folder: Path, what: str, again: str = AGAIN) -> Iterator[None]:
    """Turn an error of the file system into one that says which folder, why, and what to do (see `refused`).

    Args:
        folder: where it is written.
        what: what could not be done, as the message begins.
        again: how to go on when the disk is mended.

    Raises:
        FederationError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise refused(error, what, folder, again) from None
