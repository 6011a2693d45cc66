"""Pages that are made from the code: written, or with --check only compared."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def settle(wanted: Mapping[Path, str]) -> None:
    """Write the pages that are not what they should be; with --check name them, and end with code 1 where there is one.

    Args:
        wanted: file -> its text.
    """
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is not what the code says: run python {Path(sys.argv[0]).name}")
        sys.exit(1 if stale else 0)
    for path in stale:
        path.write_text(wanted[path])
