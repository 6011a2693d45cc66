"""What the report says of a run: plain series and rows taken from its folder, nothing computed twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florana.displayable import displayable
from florana.errors import InputError
from florana.federation.best import up_to_kept
from florana.federation.round_record import RoundRecord, record_from_json
from florana.runs.completions import last_completions
from florana.runs.run_folder import read_run
from florana.score.benchmarks import figure_names
from florana.score.glue import GLUE

SHOWN = 4
"""Completions of a generation benchmark on the page."""


def shown_figures(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The figures of a recipe (as a table) that its lines and tables show: the task's own, loss, what was written.

    Examples:
        >>> shown_figures({"task": "sequence-classification", "data": {"glue": "mrpc"}})
        ('accuracy', 'f1', 'loss')
    """
    glue = recipe.get("data", {}).get("glue")
    own = {"causal-lm": ("perplexity",), "sequence-regression": ("pearson", "spearman")}
    names = GLUE[glue].metrics if glue is not None else own.get(str(recipe.get("task")), ("accuracy",))
    asked = recipe.get("generation")
    written = (*figure_names(asked["task"], asked.get("k", [1])), "cut_prompts") if asked else ()
    return (*names, "loss", *written)


def rows_note(setup: Mapping[str, Any]) -> str:
    """What became of instructions too long for the window, of setup.json; empty where nothing did.

    Examples:
        >>> rows_note({"left_out": {"train": 2, "test": 0}, "cut_responses": {"train": 1, "test": 0}})
        '2 training and 0 test rows left out: no room for a response; 1 training and 0 test responses cut'
    """
    parts = []
    for key, what in (("left_out", "rows left out: no room for a response"), ("cut_responses", "responses cut")):
        count = setup.get(key, {})
        if any(count.values()):
            more = f", {count['validation']} validation" if count.get("validation") else ""
            parts.append(f"{count['train']} training and {count['test']} test{more} {what}")
    return "; ".join(parts)


@dataclass(frozen=True)
class RunView:
    """One run, ready to draw.

    Args:
        name: how the report calls it. recipe, setup: its files.
        recipe: the run's recipe, as its file has it.
        setup: the run's setup.json.
        records: the committed rounds.
        score: the metric that is drawn (see `headline`).
        written: (round, the first completions) of the last generation benchmark.
    """

    name: str
    recipe: Mapping[str, Any]
    setup: Mapping[str, Any]
    records: Sequence[RoundRecord]
    score: str
    written: tuple[int, Sequence[Mapping[str, Any]]] = (0, ())

    @property
    def start(self) -> float | None:
        """The starting model's score."""
        return (self.setup.get("start") or {}).get(self.score)

    def scores(self, figure: str) -> list[tuple[int, float]]:
        """(round, value) of `global`, `personal`, `clients_on_common` or `gap`, where it was measured."""
        return [
            (record.round, value)
            for record in self.records
            if (value := record.eval.get(figure, {}).get(self.score)) is not None
        ]

    @property
    def figures(self) -> dict[str, tuple[float | None, float | None]]:
        """Name -> (the starting model's, the global model's last) of the `shown_figures` that a round has."""
        start: Mapping[str, float] = self.setup.get("start") or {}
        last: dict[str, float] = {}
        for record in up_to_kept(self.recipe, self.records):
            last |= record.eval.get("global", {})
        return {name: (start.get(name), last[name]) for name in shown_figures(self.recipe) if name in last}

    def final(self, figure: str) -> float | None:
        """The last measured value; of a run that keeps its best round, that of the round that is kept."""
        kept = up_to_kept(self.recipe, self.records)[-1].round
        series = [(round_, value) for round_, value in self.scores(figure) if round_ <= kept]
        return series[-1][1] if series else None

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(round, the clients' mean training loss), where every client said one."""
        return [(r.round, r.train_loss) for r in self.records if r.train_loss is not None]

    @property
    def uplink(self) -> str:
        """The format of what clients send; runs made before there was a choice sent float32."""
        return str(self.recipe["federation"].get("uplink", "float32"))

    @property
    def uplink_errors(self) -> list[tuple[int, float]]:
        """(round, what the format of the uplink changed of the clients' updates, relative), where it is quantized."""
        return [(r.round, r.error["uplink"]) for r in self.records if r.error.get("uplink") is not None]

    @property
    def bytes_so_far(self) -> dict[int, int]:
        """Round -> bytes sent both ways up to and including it."""
        total, result = 0, {}
        for record in self.records:
            total += record.bytes_up + record.bytes_down
            result[record.round] = total
        return result

    @property
    def refused(self) -> list[tuple[int, str, str]]:
        """(round, client, reason) of every refused update."""
        return [(record.round, client, why) for record in self.records for client, why in record.refused.items()]


def view(folder: Path, name: str | None = None) -> RunView:
    """The run in a folder. Raises InputError where there is none, or no committed round."""
    recipe, setup, records = shown(read_run(folder))
    if not records:
        raise InputError(f"{folder} holds no committed round yet", fix="run it again with --resume")
    written = shown(last_completions(folder, SHOWN))
    return RunView(name or records[-1].strategy, recipe, setup, records, headline(recipe), written)


def shown(value: Any) -> Any:
    r"""What was read, with every text in it, names too, as one that may be shown; lines stay lines.

    Examples:
        >>> shown({"a": ["b" + chr(27), 1]})
        {'a': ['b\\x1b', 1]}
    """
    if isinstance(value, str):
        return displayable(value, 100_000, keep="\n")
    if isinstance(value, Mapping):
        return {shown(key): shown(item) for key, item in value.items()}
    if isinstance(value, RoundRecord):
        return record_from_json(shown(value.to_json()))
    if isinstance(value, list | tuple):
        return type(value)(shown(item) for item in value)
    return value


def headline(recipe: Mapping[str, Any]) -> str:
    """The figure of a recipe (as a table) that tables and pictures show; the journal has them all.

    Examples:
        >>> headline({"task": "causal-lm"}), headline({"task": "sequence-classification", "data": {"glue": "cola"}})
        ('loss', 'matthews')
    """
    glue = recipe.get("data", {}).get("glue")
    if glue is not None:
        return GLUE[glue].metrics[0]
    return {"causal-lm": "loss", "sequence-regression": "pearson"}.get(str(recipe.get("task")), "accuracy")


def views(folders: Sequence[Path]) -> list[RunView]:
    """The runs, named by their strategies; by their folders too where two share a strategy."""
    plain = [view(folder) for folder in folders]
    names = [one.name for one in plain]
    return [
        one if names.count(one.name) == 1 else view(folder, f"{one.name} ({folder.resolve().name})")
        for one, folder in zip(plain, folders, strict=True)
    ]


def summary(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    """One row per run: final scores, error of the last round, bytes, seconds. The table of the demo and the report."""
    rows = []
    for run in runs:
        last = run.records[-1]
        rows.append(
            {
                "strategy": run.name,
                "rounds": last.round,
                "metric": run.score,
                "start": run.start,
                "global": run.final("global"),
                "personal": run.final("personal"),
                "gap": run.final("gap"),
                "clients_on_common": run.final("clients_on_common"),
                "figures": {name: last for name, (_, last) in run.figures.items()},
                "error": last.error["overall"],
                "optimum": last.error["optimum"],
                "uplink": run.uplink,
                "uplink_error": last.error.get("uplink"),
                "bytes_up": sum(record.bytes_up for record in run.records),
                "bytes_down": sum(record.bytes_down for record in run.records),
                "server_seconds": sum(record.server_seconds for record in run.records),
                "client_seconds": sum(record.client_seconds for record in run.records),
            }
        )
    return rows
