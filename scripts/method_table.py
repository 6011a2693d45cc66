"""Write the table of docs/which-method.md, and docs/methods.md, from what every strategy declares of itself.

python scripts/method_table.py            write both
python scripts/method_table.py --check    end with code 1 where one of them is not what the declarations say
"""

from __future__ import annotations

import inspect
from pathlib import Path

from generated import settle

from florana.strategy import STRATEGIES
from florana.strategy.base import Strategy

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- methods: written by scripts/method_table.py -->", "<!-- end of methods -->"


def short_table(built: dict[str, Strategy]) -> str:
    """One row per method: what a reader compares first."""
    lines = [
        "| method | the server | trains | up | down | server step | base | heterogeneous ranks "
        "| compatible with secure aggregation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, strategy in built.items():
        facts = strategy.facts
        cells = [
            f"`{name}`",
            f"{facts.does} ({strategy.source})",
            facts.trains,
            facts.up.text,
            facts.down.text,
            facts.exact,
            facts.base,
            "no" if facts.mixed_ranks.startswith("refused") else "yes",
            facts.secure_aggregation.partition(":")[0],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(built: dict[str, Strategy]) -> str:
    """docs/methods.md: everything declared, method by method."""
    lines = [
        "# The methods",
        "",
        "Written by `scripts/method_table.py` from what each strategy declares; `tests/test_methods.py` holds the",
        "counts against the messages really sent. Counts are parameters per adapted module, client and round: r is the",
        "rank a client trains, k the rank of the frozen part sent along (complete in every broadcast), h the blocks",
        "of a core. Heads that are trained whole come on top, by the recipe's `model.head`.",
        "",
    ]
    for name, strategy in built.items():
        facts = strategy.facts
        options = [f"`{p.name} = {p.default!r}`" for p in inspect.signature(STRATEGIES[name]).parameters.values()]
        rows = {
            "server": facts.does,
            "clients train": facts.trains,
            "up": facts.up.text,
            "down": facts.down.text,
            "server step": facts.exact,
            "differs from the paper": facts.differs,
            "base": facts.base,
            "after absence": facts.absent,
            "client state": facts.client_state,
            "heterogeneous ranks": facts.mixed_ranks,
            "secure aggregation": facts.secure_aggregation,
            "robust rules": facts.robust,
            "added noise": facts.noise,
            "quantized uplink": {
                "stay": "with error feedback",
                "move": "without error feedback for the factors: those that go back are chosen anew",
            }[facts.coordinates],
            "LoRA initialisation": {
                "lora": "A random, B zero",
                "principal": "the singular vectors of the base weights",
                "gradient": "the first gradient",
            }[strategy.begin],
            "options": ", ".join(options) or "none",
        }
        lines += [f"## {name}", "", f"Source: {strategy.source}.", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value.replace('|', '/')} |" for key, value in rows.items() if value] + [""]
    return "\n".join(lines)


def choice_with(table: str) -> str:
    """docs/which-method.md with the table between its marks."""
    text = (ROOT / "docs" / "which-method.md").read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    built = {name: build() for name, build in STRATEGIES.items()}
    docs = ROOT / "docs"
    wanted = {docs / "which-method.md": choice_with(short_table(built)), docs / "methods.md": page(built)}
    settle(wanted)


if __name__ == "__main__":
    main()
