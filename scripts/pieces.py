"""A large file in pieces, for a machine that takes only small ones: cut here, joined there, checked by digest.

python scripts/pieces.py cut model.gguf FOLDER [--megabytes 50]   # FOLDER/model.gguf.0, .1, ..., and model.gguf.sha256
python scripts/pieces.py join FOLDER/model.gguf                   # writes it beside its pieces, or says what is wrong
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path


def cut(source: Path, folder: Path, size: int) -> list[Path]:
    """Write `source` as pieces of at most `size` bytes, and its digest; returns the pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces, whole = [], hashlib.sha256()
    with source.open("rb") as file:
        while piece := file.read(size):
            whole.update(piece)
            pieces.append(folder / f"{source.name}.{len(pieces)}")
            pieces[-1].write_bytes(piece)
    (folder / f"{source.name}.sha256").write_text(f"{whole.hexdigest()} {len(pieces)}\n")
    return pieces


def join(target: Path) -> Path:
    """Write `target` from the pieces beside it. Raises SystemExit where one is missing or the digest is another."""
    digest, count = Path(f"{target}.sha256").read_text().split()
    pieces = [Path(f"{target}.{index}") for index in range(int(count))]
    if missing := [piece.name for piece in pieces if not piece.is_file()]:
        sys.exit(f"{target.parent} lacks {', '.join(missing)}: bring these pieces here first")
    whole = hashlib.sha256()
    part = Path(f"{target}.part")
    with part.open("wb") as file:
        for piece in pieces:
            content = piece.read_bytes()
            whole.update(content)
            file.write(content)
    if whole.hexdigest() != digest:
        sys.exit(f"{target.name}: the joined pieces have another digest than the file had: bring them here again")
    part.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut a file into pieces, or join them.")
    commands = parser.add_subparsers(dest="command", required=True)
    cutting = commands.add_parser("cut")
    cutting.add_argument("source", type=Path)
    cutting.add_argument("folder", type=Path)
    cutting.add_argument("--megabytes", type=int, default=50)
    joining = commands.add_parser("join")
    joining.add_argument("target", type=Path)
    given = parser.parse_args()
    if given.command == "cut":
        for piece in cut(given.source, given.folder, given.megabytes * 10**6):
            print(piece)
    else:
        print(join(given.target))


if __name__ == "__main__":
    main()
