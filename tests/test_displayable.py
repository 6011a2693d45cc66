"""What others send is shown as text: three hundred strings through every field, and nobody's program ends."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from florana.adapters.merge_card import Merged, Source
from florana.cli.console import PlainConsole, console_of
from florana.cli.display import Screen, merge_table
from florana.cli.main import _complain, app
from florana.cli.say import say
from florana.displayable import displayable, log
from florana.errors import FloranaError
from florana.federation.event import Event
from florana.federation.journal import read_records
from florana.federation.messages import Brief, Failure, Reply
from florana.federation.sampling import sample
from florana.runs.run_folder import logged
from tests.federation import CLIENTS, noisy, run
from tests.hostile import FORMS, KINDS, STRINGS, forbidden


def test_there_are_three_hundred() -> None:
    assert len(STRINGS) >= 300
    assert len(set(STRINGS)) == len(STRINGS)
    assert any(forbidden(text) for text in STRINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_becomes_one_bounded_line_of_visible_characters(kind: str) -> None:
    for text in (form.replace("{}", text) for text in KINDS[kind] for form in FORMS):
        shown = displayable(text, 300)
        assert forbidden(shown, keep="") == ""
        assert len(shown) <= 300
        shown.encode()
        assert displayable(shown, 300) == shown


def test_plain_text_stays_as_it_is() -> None:
    for text in (
        "hospital-b: 54 rows",
        "Zürich, 東京, Ελλάδα, हिन्दी, \N{GRINNING FACE}",
        "a [b] $c$ {d} %s \\e",
        "é e\u0301",
    ):
        assert displayable(text) == text
    assert displayable("two\nlines", keep="\n") == "two\nlines"
    assert displayable("abcdef", 4) == "abc\N{HORIZONTAL ELLIPSIS}"


@pytest.fixture
def console() -> Console:
    """The console of a run, writing to where it can be read."""
    made = console_of(False)
    assert made is not None
    made.file = io.StringIO()
    made.width = 4000
    return made


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("text", STRINGS[::7], ids=range(len(STRINGS[::7])))
def test_the_screen_of_an_operator_shows_a_line_per_event(text: str, console: Console) -> None:
    screen = Screen(console, "run", 1)
    for kind in ("joined", "refused"):
        before = printed(console).count("\n")
        screen.show(Event(kind, 1, text, text))
        assert printed(console).count("\n") == before + 1
    assert forbidden(printed(console)) == ""


def test_every_string_passes_the_screen_and_its_markup_stays_text(console: Console) -> None:
    screen = Screen(console, "run", 1)
    for text in STRINGS:
        screen.show(Event("refused", 1, text, text))
        screen.show(Event("repaired", 1, detail=text))
        console.print(merge_table(Merged(text, 1, 0.5, 0.5, {}, [Source(text, 1.0, (1,), 1, {})])))
    assert forbidden(printed(console)) == ""
    assert "[/nope]" in printed(console)
    assert ":boom:" in printed(console)


def test_a_terminals_bar_shows_names_as_text() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=200, markup=False, emoji=False, color_system=None)
    for text in STRINGS:
        with Screen(console, displayable(text, 40), 2) as screen:
            screen.show(Event("round", 1))
            screen.step(text)
    assert "\x1b]0;" not in file.getvalue()
    assert "\x1b[8m" not in file.getvalue()
    assert forbidden(file.getvalue(), keep="\n\r\x1b") == ""


def test_the_bar_of_a_resumed_run_begins_where_the_run_stood() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=200, markup=False, emoji=False, color_system=None)
    with Screen(console, "run", 40, done=30) as screen:
        screen.step("client-0")
    assert "31/40" in file.getvalue()


def test_a_site_that_fails_with_any_reason_stops_nobody(tmp_path: Path) -> None:
    """Through the loop: what is shown and kept are bounded lines, and the round is that of the others."""
    shown: list[Event] = []
    liar = sample(CLIENTS, 3, 7, 1)[0]

    def answer(brief: Brief) -> list[Reply | Failure]:
        if brief.client == liar:
            return [Failure(brief.client, text) for text in STRINGS]
        return [noisy(brief)]

    run(tmp_path / "run", "fedit", 1, answer, show=shown.append)
    (record,) = read_records(tmp_path / "run" / "rounds.jsonl")
    assert len(record.clients) == 2
    assert record.refused.keys() == {liar}
    reasons = [event.detail for event in shown if event.kind == "refused"]
    assert len(reasons) == len(STRINGS)
    for reason in (*reasons, record.refused[liar]):
        assert forbidden(reason, keep="") == ""
        assert len(reason) <= 500


def test_errors_are_told_with_nothing_else_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    for text in STRINGS:
        _complain(str(FloranaError(text, why=text, fix=text)))
        say(text)
        say(text, err=True)
    out, err = capsys.readouterr()
    assert forbidden(out) == ""
    assert forbidden(err) == ""


def test_logs_hold_lines_of_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with logged(tmp_path):
        for text in STRINGS:
            log.warning("node %s is left out: %s", text, text)
            try:
                raise ValueError(text)
            except ValueError:
                log.exception("client %s failed", text)
    content = (tmp_path / "log.txt").read_text()
    assert forbidden(content) == ""
    assert content.count(" WARNING node ") == len(STRINGS)
    assert logging.getLogger("florana") is log


@pytest.mark.parametrize("verb", ["inspect", "merge"])
def test_adapters_with_hostile_names_end_with_their_exit_code(verb: str, tmp_path: Path) -> None:
    codes = set()
    strings = [text for text in STRINGS if len(text) < 1000 and "\x00" not in text]
    for index, text in enumerate(strings[verb == "merge" :: 4]):
        try:
            text.encode()
        except UnicodeEncodeError:
            continue
        folder = tmp_path / str(index)
        folder.mkdir()
        name = f"base_model.model.layer.{text}.q"
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 3), f"{name}.lora_B.weight": torch.ones(4, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "task_type": text}
        config["base_model_name_or_path"] = text
        (folder / "adapter_config.json").write_text(json.dumps(config))
        extra = ["--out", str(tmp_path / f"out-{index}")] if verb == "merge" else []
        done = CliRunner().invoke(app, [verb, str(folder), str(folder), *extra])
        assert done.exception is None or isinstance(done.exception, FloranaError | SystemExit), (text, done.exception)
        assert forbidden(done.output) == ""
        codes.add(done.exit_code if done.exception is None else getattr(done.exception, "exit_code", 2))
    assert codes <= {0, 2, 3}


def test_what_an_encoding_lacks_is_written_as_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    from florana.cli import main

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(main, "app", lambda: print("Zürich 東京", file=stream))
    main.main()
    stream.flush()
    assert stream.buffer.getvalue() == b"Z\\xfcrich \\u6771\\u4eac\n"  # type: ignore[attr-defined]
