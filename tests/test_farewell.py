"""The end of a federation: every site has the adapter of the run, and what is no adapter of its model is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.adapters.adapter_folder import read_adapter
from florana.errors import InputError
from florana.federation import client_state
from florana.federation.client_state import recall
from florana.federation.journal import Journal
from florana.federation.messages import Brief, Step, pack
from florana.federation.sealed_client import SealedClient, in_memory
from florana.federation.terms import Sealing
from florana.flower.app.codec import brief_frame, sealed_frame
from florana.flower.app.farewell import ENDED, ended_frame
from florana.flower.app.frames import Frame
from florana.flower.app.site import Site
from florana.flower.app.site_card import digest
from florana.flower.deploy import join as join_of
from florana.flower.deploy.final_adapter import checked, written
from florana.flower.deploy.join import told
from florana.lora.factors import Adapter, LoraFactors
from florana.recipe.load import check
from florana.recipe.usage import Usage, read_usage
from florana.secure.identities import made_up
from tests.federation import CARD
from tests.flower_grid import FakeGrid
from tests.flower_sites import led, roster_of, sites


def federated(table: dict[str, Any], folder: Path, ends: Callable[[Site, Frame], Frame]) -> tuple[Any, dict[str, Site]]:
    """A run whose sites take its end by `ends`; the events, and the sites."""
    members = sites(check(table, "t"), folder / "kept")

    def answers(site: Site) -> Callable[[Frame], Frame]:
        return lambda frame: told(site, frame, folder / site.who, lambda text: None, lambda last: ends(site, last))

    nodes = {number: (name.encode(), answers(site)) for number, (name, site) in enumerate(members.items(), 1)}
    roster = roster_of(members, folder)
    return led(check(table, "t"), FakeGrid(nodes), roster, folder / "run", base=True), members


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("best-rank", {}),
        ("oracle", {}),
        ("fed-sb", {}),
        ("fedit", {"head": "personal"}),
        ("fedit", {"variant": "dora"}),
    ],
)
def test_every_site_has_the_adapter_of_the_run(
    strategy: str, more: dict[str, Any], recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe_table["strategy"] = {"name": strategy}
    recipe_table["model"] |= more
    recipe_table["federation"] = {"rounds": 2}
    taken: dict[str, Adapter] = {}

    def take(site: Site, frame: Frame) -> Frame:
        own = recall(site.folder, str(frame.fields["run"]), site.who, int(frame.fields["rounds"]) + 1)
        taken[site.who] = checked(frame, site.start, own)
        return Frame(ENDED)

    events, members = federated(recipe_table, tmp_path, take)
    said = [(event.client, event.detail) for event in events if event.kind == "told"]
    assert sorted(said) == [(name, "has the adapter") for name in sorted(members)]
    whole = Journal(tmp_path / "run", CARD).kept()
    for adapter in taken.values():
        assert adapter.scalings == whole.scalings
        for name, tensor in whole.tensors().items():
            assert torch.equal(adapter.tensors()[name], tensor)
    if "variant" not in more:  # florana reads no DoRA back
        assert read_adapter(tmp_path / "run" / "adapter")[0].modules.keys() == whole.modules.keys()
    if more.get("head") == "personal":
        heads = [{name: tensor.flatten().tolist() for name, tensor in one.extra.items()} for one in taken.values()]
        assert all(head and head != heads[0] for head in heads[1:])  # each its own


def test_a_site_that_does_not_take_it_changes_nothing(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["federation"] = {"rounds": 1}

    def refuses(site: Site, frame: Frame) -> Frame:
        raise InputError("no room")

    events, _ = federated(recipe_table, tmp_path, refuses)
    details = {event.detail for event in events if event.kind == "told"}
    assert details == {"did not take the adapter: no room"}
    assert (tmp_path / "run" / "adapter" / "README.md").exists()


def test_a_run_without_a_global_model_ends_without_an_adapter() -> None:
    frame = ended_frame("x", 3, None)
    assert (frame.kind, frame.payload) == (ENDED, b"")


def of(
    rank: int,
    *,
    inner: int = 5,
    module: str = "m",
    head: str = "head",
    value: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    pair = LoraFactors(torch.full((3, rank), value).to(dtype), torch.full((rank, inner), value).to(dtype), 2.0)
    return Adapter({module: pair}, {head: torch.full((2, 2), value)})


def frame_of(adapter: Adapter, **fields: Any) -> Frame:
    return Frame(ENDED, {"run": "x", "rounds": 1, "scalings": adapter.scalings, **fields}, pack(adapter))


def test_only_the_rank_may_be_another() -> None:
    assert checked(frame_of(of(4)), of(2), {}).modules["m"].rank == 4


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (frame_of(of(2, inner=6)), "does not fit module 'm'"),
        (frame_of(of(2, module="n")), "other modules"),
        (frame_of(of(2, head="eval")), "a tensor 'eval'"),
        (frame_of(of(2, value=math.nan)), "not finite in 'A/m'"),
        (frame_of(of(2), scalings={}), "without a single LoRA module"),
        (frame_of(of(2), scalings=None), "no scalings"),
        (frame_of(of(2), scalings={"m": math.inf}), "not a positive number"),
        (frame_of(of(2), scalings={"m": True}), "no scalings"),
        (frame_of(of(2), scalings={"m": 1.0, "n": 1.0}), "KeyError"),
        (replace(frame_of(of(2)), payload=b"x" * 40), "no adapter"),
        (frame_of(of(2, dtype=torch.float64)), "does not fit module 'm'"),
        (frame_of(of(2), scalings={"m": -1.0}), "not a positive number"),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused(frame: Frame, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked(frame, of(2), {})


def test_the_adapter_before_is_kept_and_none_before_that(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0, 3.0):  # the last again: a finished run that is served once more
        place = written(of(2, value=value), replace(CARD, target_modules=("m",)), Usage(task="causal-lm"), tmp_path)
    assert float(read_adapter(place)[0].modules["m"].B[0, 0]) == 3.0
    assert float(read_adapter(tmp_path / "adapter-before")[0].modules["m"].B[0, 0]) == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter-before"]
    assert read_usage(place) == Usage(task="causal-lm")
    assert json.loads((place / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_last_message_with_senseless_rounds_is_a_run_of_none() -> None:
    said: list[int] = []
    for rounds in (math.inf, math.nan, "3", None, [1], 2):
        frame = Frame(ENDED, {"run": "x", "rounds": rounds})
        said.append(join_of._round_of(frame))
    assert said == [0, 0, 0, 0, 0, 2]


def test_a_site_answers_in_the_form_that_its_own_recipe_says(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["federation"] = {"rounds": 1}
    members = sites(check(recipe_table, "t"), tmp_path / "kept")
    site = next(iter(members.values()))
    brief = Brief(1, site.who, 0, pack(site.start), False, ["A", "B"], ["A", "B"], site.start.scalings)
    for change in ({"uplink": "int8"}, {"uplink": "bfloat16", "feedback": ["A"]}, {"feedback": ["A", "B"]}):
        answer = site.answer(brief_frame(replace(brief, **change), "run", "nonce", digest(site.card)))
        assert answer.kind == "failure"
        assert "its own recipe says float32" in str(answer.fields["reason"])
    assert site.answer(brief_frame(brief, "run", "nonce", digest(site.card))).kind == "reply"


KINDS: dict[str, tuple[set[str], set[str]]] = {
    "fedit": ({"A", "B"}, {"A", "B"}),
    "fedsa-lora": ({"A", "B"}, {"A"}),
    "ffa-lora": ({"B"}, {"B"}),
    "rolora": ({"A", "B"}, {"A", "B"}),
    "local-only": ({"A", "B"}, set()),
    "fed-sb": ({"core"}, {"core"}),
}


@pytest.mark.parametrize("strategy", KINDS)
def test_what_stays_at_a_site_by_its_own_recipe_is_not_sent(
    strategy: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """A server that was taken over asks for more than the method sends: the B that FedSA-LoRA keeps at home, say."""
    recipe_table |= {"federation": {"rounds": 4}, "strategy": {"name": strategy}}
    site = next(iter(sites(check(recipe_table, "t"), tmp_path / "kept").values()))
    assert site.own is not None
    trains, up = KINDS[strategy]
    assert (site.own.trains, site.own.up) == (trains, up)
    every = {"A", "B", "core", "scale", "extra", "x"}
    brief = Brief(1, site.who, 0, pack(site.start), False, sorted(trains), sorted(up), site.start.scalings)
    asked = [(sorted(trains | {kind}), sorted(up)) for kind in every - trains]
    asked += [(sorted(trains), sorted(up | {kind})) for kind in every - up]
    for more, back in asked:
        frame = brief_frame(replace(brief, trains=more, returns=back), "run", "nonce", digest(site.card))
        answer = site.answer(frame)
        assert answer.kind == "failure"
        assert "which by its own recipe it does not train, or does not send" in str(answer.fields["reason"])
    assert not answer.payload


def test_what_stays_at_a_site_is_in_no_sum_either(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table |= {"federation": {"rounds": 4}, "strategy": {"name": "fedsa-lora"}}
    site = next(iter(sites(check(recipe_table, "t"), tmp_path / "kept").values()))
    sealing = SealedClient(made_up([site.who])[site.who], Sealing(20, 100, 3), None, 5, in_memory())
    site = replace(site, sealed=sealing)
    for returns, words in ((["A", "B"], "a sum of B, which"), (["A"], "knows nothing of this session")):
        step = Step({"step": "masked", "session": "s", "trip": 0, "returns": returns})
        answer = site.answer(sealed_frame(step, "run", "nonce", digest(site.card)))
        assert answer.kind == "failure"
        assert words in str(answer.fields["reason"])


def test_a_site_that_measures_nothing_tells_no_scores(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table |= {"federation": {"rounds": 1}, "evaluate": {"personal": "never"}}
    site = next(iter(sites(check(recipe_table, "t"), tmp_path / "kept").values()))
    brief = Brief(1, site.who, 0, pack(site.start), True, ["A", "B"], ["A", "B"], site.start.scalings)
    answer = site.answer(brief_frame(brief, "run", "nonce", digest(site.card)))
    assert (answer.kind, answer.payload) == ("failure", b"")
    assert "by its own recipe it measures none" in str(answer.fields["reason"])
    assert site.answer(brief_frame(replace(brief, evaluate=False), "run", "nonce", digest(site.card))).kind == "reply"


def test_a_server_cannot_fill_a_site_with_runs_that_it_makes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_state, "KEPT_RUNS", 3)
    kept = {"extra/head": torch.ones(2)}
    for run in ("a", "b", "c"):
        client_state.keep(tmp_path, run, "site", 1, kept)
    with pytest.raises(InputError, match="of 3 runs, and this would be another"):
        client_state.keep(tmp_path, "d", "site", 1, kept)
    client_state.keep(tmp_path, "b", "site", 2, kept)  # one that is known goes on
    assert len(list(tmp_path.iterdir())) == 3
