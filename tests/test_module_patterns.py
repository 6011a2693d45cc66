"""Patterns of an adapter's configuration: read as Python's re reads them, or refused by name; in bounded time."""

from __future__ import annotations

import json
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from florana.adapters import patterns as module_patterns
from florana.adapters.adapter_folder import read_adapter
from florana.adapters.patterns import by_pattern
from florana.cli.main import app
from florana.errors import InputError

PATH = Path("adapter_config.json")
LONG = "a" * 200 + "!"


def asked(key: str, name: str) -> bool:
    return by_pattern({key: 2.0}, [name], 1.0, PATH, "rank_pattern")[name] == 2.0


# Python's `re` needs longer than the age of the universe for each of these on LONG; none of them matches it.
CATASTROPHIC = [
    "(a+)+$",
    "(a|a)*",
    "(a|aa)+",
    "([a-z]+)*$",
    "(.*a){25}b",
    "(a?){60}a{200}",
    r"(\w+\s?)*x",
    "((a*)*)*b",
    "(?:(?:a|b|ab)+)+c",
    "(a|a)" * 60,
]
REFUSED = [
    r"(a+)+\1",  # a back reference
    "(?=(a+)+b)a",
    "(?!x)a",
    "(?<=a)a",
    "(?>a+)b",
    "(?P<n>a+)(?P=n)",
    "(?(1)a|b)",
    "(?i:A)",
    "(?#text)a",
    "a++",
    "a{2}+",
    "a?+",
    "a{e<=1}",
    "a{,3}",
    "[[:alpha:]]",
    "[a[b]]",
    "[a&&b]",
    "[a--b]",
    "[a||b]",
    r"\p{L}",
    r"a\Z",
    r"\<a",
    r"\x61",
    "((a{1,99}){1,99}){1,99}",  # a hundred megabytes of automaton
    "(?:" * 90 + "a" + "{1,100})" * 90,
    "a{1,1000000}",
    "a" * 1001,
]


@pytest.mark.parametrize("key", CATASTROPHIC)
def test_what_would_hang_is_answered_at_once(key: str) -> None:
    started = time.process_time()
    assert not asked(key, LONG)
    assert time.process_time() - started < 1
    short = "aab"
    assert asked(key, short) == bool(re.match(rf"(.*\.)?({key})$", short))


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_read_in_two_ways_or_costs_too_much_is_refused_by_name(key: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        asked(key, LONG)
    assert time.process_time() - started < 1
    assert caught.value.exit_code == 3
    text = str(caught.value)
    assert "adapter_config.json: 'rank_pattern'" in text
    assert ascii(key)[1:50] in text


@pytest.mark.parametrize("key", ["(", "a)", "[z-a]", "*a", "a**", "a{3,2}", r"a\-\q"])
def test_what_is_no_regular_expression_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="'alpha_pattern': the pattern"):
        by_pattern({key: 2.0}, ["a"], 1.0, PATH, "alpha_pattern")


PIECES = r"a b _ 1 . \. \d \w \W \b [ab] [^a] [a-b1] [-a] [\d_] ^ $ * + ? *? {2} {1,2} {0,} | ( ) (?: \_ \- - & # ~"


@settings(max_examples=1000)
@given(pieces=st.lists(st.sampled_from([*PIECES.split(), " ", r"\ "]), min_size=1, max_size=8),
       name=st.text(alphabet="ab1._- ", min_size=1, max_size=7))  # fmt: skip
def test_every_answer_is_that_of_python(pieces: list[str], name: str) -> None:
    """Random patterns of the pieces people use, on short names, where Python can be waited for."""
    key = "".join(pieces)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = bool(re.match(rf"(.*\.)?({key})$", name))
    except re.error:
        with pytest.raises(InputError):
            asked(key, name)
        return
    try:
        answer = asked(key, name)
    except InputError:
        answer = wanted  # refused: nothing is said that could be wrong
    assert answer == wanted


@pytest.mark.parametrize(
    "key", ["q", "a.b", r"a\.b", "(a|b)+", "[ab]*", r"\d{1,2}", ".*", "^a", "a$", "a|b", "a)(b", r"\_", r"a\ b"]
)
def test_what_people_write_is_not_refused(key: str) -> None:
    for name in ("q", "a.b", "x.a", "ab", "b", "12", "a", "_", "a b"):
        assert asked(key, name) == bool(re.match(rf"(.*\.)?({key})$", name)), name


def test_the_first_key_counts_and_a_key_that_is_not_asked_for_is_not_read() -> None:
    patterns = {"layer.1.*": 3.0, "q": 5.0, "((": 7.0}
    names = ["layer.1.q", "layer.2.q"]
    assert by_pattern(patterns, names, 1.0, PATH, "rank_pattern") == {"layer.1.q": 3.0, "layer.2.q": 5.0}
    with pytest.raises(InputError, match=r"not a regular expression|bounded time"):
        by_pattern(patterns, [*names, "layer.2.v"], 1.0, PATH, "rank_pattern")


def test_names_that_the_two_libraries_may_read_differently_are_refused_beside_patterns_alone() -> None:
    for name in ("a\n", "é", "a\x1cb"):
        with pytest.raises(InputError, match="is not plain text"):
            by_pattern({"b": 2.0}, [name], 1.0, PATH, "rank_pattern")
        assert by_pattern({}, [name], 1.0, PATH, "rank_pattern") == {name: 1.0}


def test_many_patterns_together_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_patterns, "SECONDS", 0.2)
    patterns = {f"(?:a{{1,30}}){{1,30}}{u}": 2.0 for u in range(10_000)}
    started = time.process_time()
    with pytest.raises(InputError, match=r"matching its 10000 patterns with 500 modules takes too long.*\n.*0\.2 s"):
        by_pattern(patterns, [f"{'a' * 150}.{u}!" for u in range(500)], 1.0, PATH, "rank_pattern")
    assert time.process_time() - started < 2


def test_a_thousand_plain_patterns_of_a_thousand_modules_are_not_too_many() -> None:
    names = [f"model.layers.{u}.self_attn.q_proj" for u in range(1000)]
    values = {name: float(u + 1) for u, name in enumerate(reversed(names))}
    assert by_pattern(values, names, 0.5, PATH, "rank_pattern") == values


def test_the_command_line_names_file_key_and_pattern(tmp_path: Path) -> None:
    name = "base_model.model." + "a" * 60
    for place, setting in ((tmp_path / "one", "rank_pattern"), (tmp_path / "two", "alpha_pattern")):
        place.mkdir()
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["a"],
            setting: {"(?:(a+)+)+(?=b)": 3},
        }
        (place / "adapter_config.json").write_text(json.dumps(config))
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 5), f"{name}.lora_B.weight": torch.ones(4, 2)}
        save_file(tensors, place / "adapter_model.safetensors")
        done = CliRunner().invoke(app, ["inspect", str(place)])
        assert done.exit_code == 3 or getattr(done.exception, "exit_code", None) == 3
        with pytest.raises(InputError) as caught:
            read_adapter(place)
        for word in (str(place / "adapter_config.json"), setting, "(?:(a+)+)+(?=b)"):
            assert word in str(caught.value)
