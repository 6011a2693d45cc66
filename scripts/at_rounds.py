"""Two methods of a study at rounds before, or after, its last: paired by seed, as `florana compare` does it at the end.

    python scripts/at_rounds.py STUDY FIRST SECOND ROUND [ROUND ...]

    STUDY           the study's folder; its runs may have been gone on with (florana run --resume RUN)
    FIRST, SECOND   folders of two methods, as they stand below STUDY/runs/SETTING/seed-N

One line per round and figure: the means of both with 95 % intervals, and the mean difference.
"""

from __future__ import annotations

import sys
from pathlib import Path

from florana.federation.journal import read_records
from florana.study.estimates import Estimate, estimate, paired


def scores(study: Path, method: str, round_: int, figure: str) -> dict[int, float]:
    """Seed -> the global model's figure after that round, of the runs that measured it there."""
    found = {}
    for folder in study.glob(f"runs/*/seed-*/{method}"):
        for record in read_records(folder / "rounds.jsonl"):
            if record.round == round_ and figure in record.eval.get("global", {}):
                found[int(folder.parent.name.removeprefix("seed-"))] = record.eval["global"][figure]
    return found


def told(found: Estimate | None) -> str:
    """An estimate as text."""
    if found is None or found.half is None:
        return "-"
    return f"{found.mean:+.4f} ± {found.half:.4f} ({found.seeds} seeds)"


def main() -> None:
    study, first, second, *rounds = sys.argv[1:]
    for round_ in map(int, rounds):
        for figure in ("accuracy", "loss"):
            one, other = (scores(Path(study), method, round_, figure) for method in (first, second))
            difference, p_value = paired(one, other)
            print(
                f"round {round_}, {figure}: {told(estimate(list(one.values())))}, beside "
                f"{told(estimate(list(other.values())))}, difference {told(difference)}, p {p_value}"
            )


if __name__ == "__main__":
    main()
