"""Write docs/models.md's table: run every family of tests/families.py and load what it leaves by PEFT alone.

python scripts/model_table.py

A run of one round each, on the CPU; about three minutes. tests/test_models.py holds the families listed to the table of
the tests, and each run to its reload.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import test_models as held
from tests.families import CLASSES, FAMILIES, Family

BEGIN, END = "<!-- families: written by scripts/model_table.py -->", "<!-- end of families -->"


def row(name: str, family: Family, texts: Path) -> str:
    """One line: what is adapted, what is trained whole, and how far the two figures lie apart, by task."""
    apart, whole = [], "none"
    for task in family.tasks:
        with tempfile.TemporaryDirectory() as folder:
            measured, reloaded, adapter = held.run_and_reload(family, task, texts, Path(folder))
        apart.append(f"{measured['loss']:.4f} / {reloaded['loss']:.4f}")
        if task == CLASSES:
            whole = ", ".join(sorted({f"`{tensor.rpartition('.')[0]}`" for tensor in adapter.extra}))
    targets = family.targets if isinstance(family.targets, str) else ", ".join(family.targets)
    cells = [name, f"`{family.config}`", family.kind, ", ".join(family.tasks), f"`{targets}`", whole, ", ".join(apart)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Write the table between its marks."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        held.write_texts(Path(folder))
        lines = [
            "| family | configuration | kind | tasks | targets | trained whole to classify | loss: run / PEFT alone |",
            "|---|---|---|---|---|---|---|",
            *(row(name, family, Path(folder)) for name, family in FAMILIES.items()),
        ]
    path = ROOT / "docs" / "models.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
