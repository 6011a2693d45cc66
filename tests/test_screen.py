"""What people see: no figure is cut, on a wide or on a narrow terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from florana.cli.display import summary_table
from florana.report.page import duration

ROW = {
    "metric": "accuracy",
    "start": 0.1234,
    "global": 0.5678,
    "personal": 0.6789,
    "gap": 0.1111,
    "error": 0.0456,
    "optimum": 3.6e-08,
    "bytes_up": 8 * 2**20,
    "bytes_down": 77 * 2**20,
    "server_seconds": 0.42,
}


@pytest.mark.parametrize("width", [80, 119, 120, 140])
def test_every_figure_is_whole_at_every_width(width: int) -> None:
    rows = [{**ROW, "strategy": name} for name in ("fedit", "flora-na", "best-rank", "oracle")]
    out = io.StringIO()
    Console(file=out, width=width).print(summary_table(rows, "title", width))
    text = out.getvalue()
    for figure in (
        "accuracy: start",
        "0.1234",
        "0.5678",
        "0.1111",
        "3.6e-08",
        "8.0 MiB",
        "77.0 MiB",
        "420 ms",
        "best-rank",
    ):
        assert figure in text
    assert "…" not in text


def test_durations_round_to_whole_units() -> None:
    assert [duration(value) for value in (0.4, 59.4, 59.6, 3600)] == ["0 s", "59 s", "1 min 0 s", "1 h 0 min"]
