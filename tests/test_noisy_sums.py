"""[privacy] unit = "clients": no client moves a sum by more than its clip, and noise covers that."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from florana.dp.accounting import Mechanism, epsilon_of
from florana.dp.ledger import Ledger
from florana.dp.noise import Draws
from florana.errors import RecipeError
from florana.federation.event import Event
from florana.federation.gather import briefs_of
from florana.federation.hidden_part import hidden, room, spread_of
from florana.federation.journal import read_records
from florana.federation.noisy_mean import noisy_mean
from florana.federation.sampling import sample
from florana.federation.trip_memory import update_in
from florana.lora.factors import Adapter, LoraFactors, Update
from florana.recipe.schema import Recipe
from florana.runs.chosen_strategy import strategy_of
from florana.runs.noisy_sums import noising_of
from florana.runs.prepared import prepare
from florana.runs.private_runs import LEDGER
from florana.runs.setup import clients_of, execute, federation_of, first_state
from florana.strategy import STRATEGIES
from florana.strategy.base import Named, Payload
from florana.train.client_clip import clipped
from tests.test_cohort import made


def private(table: dict[str, Any], **sections: Any) -> Recipe:
    budget = {"unit": "clients", "epsilon": 8.0, "delta": 1e-2, "clip": 0.3, "accountant": "rdp"}
    plain = {
        "strategy": {"name": "best-rank", "source": "sums"},
        "federation": {"rounds": 3, "clients_per_round": 3, "weighting": "uniform"},
        "evaluate": {"personal": "never"},
    }
    return made(table, privacy={**budget, **sections.pop("privacy", {})}, **{**plain, **sections})


def adapter(seed: int, scale: float = 1.0, rank: int = 2) -> Adapter:
    """Two unlike modules of scaling 3 and a head."""
    draws = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return scale * torch.randn(shape, generator=draws)

    modules = {n: LoraFactors(drawn(o, rank), drawn(rank, i), 3.0) for n, o, i in (("q", 5, 7), ("v", 6, 4))}
    return Adapter(modules, {"head": drawn(3, 2)})


def length(after: Adapter, before: Adapter) -> float:
    """The float64 oracle: dense products."""
    square = 0.0
    for name, pair in after.modules.items():
        old = before.modules[name]
        dense = pair.scaling * pair.B.double() @ pair.A.double() - old.scaling * old.B.double() @ old.A.double()
        square += float(dense.square().sum())
    square += sum(float((t.double() - before.extra[n].double()).square().sum()) for n, t in after.extra.items())
    return math.sqrt(square)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 3.0), most=st.floats(0.01, 50.0))
def test_an_update_is_cut_to_its_clip_and_no_shorter(seed: int, scale: float, most: float) -> None:
    before, after = adapter(seed), adapter(seed + 1, scale)
    whole = length(after, before)
    cut = clipped(after, before, most)
    if whole <= most:
        assert cut is after
    else:
        assert length(cut, before) <= most * (1 + 1e-5)
        assert length(cut, before) > 0.0


def both(seed: int, strategy: str, **options: Any) -> tuple[Any, Payload, dict[str, Payload]]:
    built = STRATEGIES[strategy](**options)
    state = built.init(adapter(seed))
    payloads = {client: built.brief(state, client) for client in ("a", "b", "c")}
    return built.sums, payloads["a"], payloads


def measured(sums: Any, trip: int, question: Named, sent: Payload, trained: Adapter, client: str) -> Update:
    found = sums.measure(trip, 1, question if trip else sent.question, sent.adapter, trained)
    return Update(client, 1, sent.adapter, 5, {}, found)


@pytest.mark.parametrize(("strategy", "options"), [("best-rank", {"source": "sums"}), ("fedask", {})])
@pytest.mark.parametrize("trip", [0, 1])
def test_no_client_moves_a_sum_by_more_than_its_clip(strategy: str, options: dict[str, Any], trip: int) -> None:
    """Even one that lies about having cut its update; and an honest one is not cut again."""
    sums, sent, payloads = both(0, strategy, **options)
    first = [measured(sums, 0, {}, sent, sent.adapter, "a").measured]
    question = sums.ask(sent.adapter, first) if trip else {}
    honest = clipped(adapter(9), sent.adapter, 0.7)
    asking = (sums, trip, 1, question)

    def moved(trained: Adapter) -> tuple[float, float]:
        quiet = Draws(bytes(32))
        update = measured(sums, trip, question, sent, trained, "b")
        with_it = noisy_mean([update], asking, payloads, 0.7, 0.0, quiet)
        without = noisy_mean([], asking, payloads, 0.7, 0.0, quiet)
        plain = measured(sums, trip, question, sent, sent.adapter, "b").measured
        own = math.hypot(*(float((update.measured[n].double() - plain[n].double()).norm()) for n in plain))
        return 3 * math.hypot(*(float((with_it[n] - without[n]).double().norm()) for n in without)), own

    size, own = moved(honest)
    assert size == pytest.approx(own, rel=1e-4)
    assert own <= 0.7 * (1 + 1e-4)
    size, own = moved(adapter(11, 50.0))
    assert own > 100
    assert size == pytest.approx(0.7, rel=1e-3)


def test_a_client_cuts_its_own_update(recipe_table: dict[str, Any]) -> None:
    recipe = private(recipe_table, privacy={"clip": 0.01})
    setup = prepare(recipe)
    strategy = strategy_of(recipe, sorted(setup.clients))
    begun = first_state(recipe, setup, strategy)
    sent = {"client-0": strategy.brief(begun, "client-0")}
    (brief,) = briefs_of(strategy, sent, 1, federation_of(recipe, setup, sorted(setup.clients), setup.examples))
    reply, kept = clients_of(recipe, setup, begun).fit(brief, {})
    both = update_in(kept, brief.scalings)
    assert both is not None
    assert length(both[1], both[0]) == pytest.approx(0.01, rel=5e-2), "training moved it much further"
    assert strategy.sums is not None
    plain = strategy.sums.measure(0, 1, sent["client-0"].question, both[0], both[0])
    told = load(reply.payload)
    assert math.hypot(*(float((told[n] - plain[n]).norm()) for n in plain)) <= 0.0101


def test_the_noise_is_sigma_times_the_clip_over_the_clients_asked() -> None:
    sums, sent, payloads = both(3, "best-rank", source="sums")
    update = measured(sums, 0, {}, sent, sent.adapter, "a")
    drawn = []
    for key in range(60):
        found = noisy_mean([update], (sums, 0, 1, {}), payloads, 0.5, 4.0, Draws(key.to_bytes(32, "big")))
        drawn.append(torch.cat([(found[n] - update.measured[n]).flatten() for n in sorted(found)]))
    spread = torch.stack(drawn) * 3 / (0.5 * 4.0)
    assert float(spread.std()) == pytest.approx(1.0, abs=0.03)
    assert float(spread.mean()) == pytest.approx(0.0, abs=0.03)


def test_clients_are_charged_for_the_rounds_they_are_asked_in(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = private(recipe_table)
    execute(recipe, tmp_path / "run")
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    charges = Ledger(tmp_path / "run" / LEDGER).charges()
    names = [f"client-{n}" for n in range(4)]
    for round_ in (1, 2, 3):
        asked = sample(names, 3, recipe.seed, round_)
        assert sorted(charge.client for charge in charges if charge.round == round_) == asked
    assert {(charge.rate, charge.steps) for charge in charges} == {(1.0, 2)}
    sigma = charges[0].noise_multiplier
    most = max(sum(c.client == name for c in charges) for name in names)
    spent = epsilon_of([Mechanism(1.0, sigma, 2 * most)], 1e-2, "rdp")
    assert 7.9 < spent <= 8.0
    assert records[-1].notes["epsilon"] == pytest.approx(spent)
    assert records[-1].train_loss is None
    assert records[-1].error["overall"] is None
    page = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "all that one client holds" in page
    assert "whoever has the recipe can take it off" in page


def test_two_sittings_end_in_the_same_bytes_and_a_spent_budget_ends_the_run(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = private(recipe_table, strategy={"name": "fedask"})
    for name, until in (("one", None), ("two", 1), ("two", None)):
        execute(recipe, tmp_path / name, until=until, resume=(tmp_path / name).exists())
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    short = private(recipe_table, privacy={"max_rounds": 1})
    seen: list[Event] = []
    execute(short, tmp_path / "short", show=seen.append)
    assert [event.kind for event in seen].count("ended") == 1
    done = len(read_records(tmp_path / "short" / "rounds.jsonl"))
    charges = Ledger(tmp_path / "short" / LEDGER).charges()
    assert done == 1
    assert len(charges) == 3, "a round that is not done is not charged"


def test_a_server_draws_anew_and_counts_a_round_that_it_begins_again(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = private(recipe_table, privacy={"max_rounds": 3})
    noising = noising_of(recipe, ["a", "b", "c"], tmp_path, simulated=False)
    assert noising is not None
    drawn = [noising.begin(1, ["a", "b"], b"x").normal(3) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert len(Ledger(tmp_path / LEDGER).charges("a")) == 2
    here = noising_of(recipe, ["a", "b", "c"], tmp_path / "here", simulated=True)
    assert here is not None
    drawn = [here.begin(1, ["a", "b"], b"x").normal(3) for _ in range(2)]
    assert torch.equal(*drawn)
    assert len(Ledger(tmp_path / "here" / LEDGER).charges("a")) == 1
    assert dataclasses.replace(here).multiplier == noising.multiplier


def test_a_clients_own_noise_covers_its_part_of_a_secure_sum() -> None:
    draws = torch.Generator().manual_seed(1)
    changes = {"y": 3.0 * torch.randn(40, 50, generator=draws), "head": torch.randn(20, generator=draws)}
    spread = spread_of(5.0, 0.8, 5)
    assert spread == pytest.approx(5.0 * 0.8 / 2)
    wide = dict.fromkeys(changes, room(1e9, 0.8, spread))
    quiet = hidden(changes, wide, 0.8, 0.0, Draws(bytes(32)))
    assert math.hypot(*(float(tensor.norm()) for tensor in quiet.values())) == pytest.approx(0.8)
    noisy = hidden(changes, wide, 0.8, spread, Draws(bytes(32)))
    left = torch.cat([(noisy[n] - quiet[n]).flatten() for n in sorted(noisy)])
    assert float(left.std()) == pytest.approx(spread, rel=0.05)
    tight = hidden(changes, dict.fromkeys(changes, 0.1), 0.8, spread, Draws(bytes(32)))
    assert max(float(tensor.abs().max()) for tensor in tight.values()) == pytest.approx(0.1)
    assert room(0.1, 0.8, spread) == pytest.approx(0.1 + 7 * spread)


@pytest.mark.parametrize("strategy", [{"name": "best-rank", "source": "sums"}, {"name": "fedask"}])
def test_with_secure_sums_each_client_pays_for_each_trip(
    strategy: dict[str, Any], recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("Crypto", reason="the extra 'secure' is not installed")
    recipe = private(
        recipe_table,
        strategy=strategy,
        privacy={"secure_aggregation": True, "max_rounds": 2},
        federation={"rounds": 4, "clients_per_round": 4, "weighting": "uniform", "min_clients": 3},
    )
    seen: list[Event] = []
    execute(recipe, tmp_path / "run", show=seen.append)
    ended = [event.detail for event in seen if event.kind == "ended"]
    assert len(ended) == 1
    assert "the privacy budget is spent" in ended[0]
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    assert [(record.round, record.train_loss, record.error["overall"]) for record in records] == [
        (1, None, None),
        (2, None, None),
    ]
    charges = Ledger(tmp_path / "run" / LEDGER).charges()
    assert len(charges) == 4 * 2 * 2
    for client in {charge.client for charge in charges}:
        own = [charge.mechanism for charge in charges if charge.client == client]
        assert 7.9 < epsilon_of(own, 1e-2, "rdp") <= 8.0
    again = made(recipe.model_dump(exclude_none=True), federation={"rounds": 2})
    for until in (1, None):
        execute(again, tmp_path / "two", until=until, resume=(tmp_path / "two").exists())
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "two")]
    assert files[0] == files[1]


def test_a_server_of_real_sites_adds_noise_that_nobody_can_repeat(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed")
    from tests.flower_sites import grid_of, led, roster_of, sites

    plain = {"rounds": 2, "clients_per_round": 4, "weighting": "uniform", "min_clients": 3}
    recipe = private(recipe_table, federation=plain, privacy={"max_rounds": 1})
    members = sites(recipe, tmp_path / "kept")
    events = led(recipe, grid_of(members), roster_of(members, tmp_path), tmp_path / "run")
    assert [event.kind for event in events].count("ended") == 1
    (record,) = read_records(tmp_path / "run" / "rounds.jsonl")
    assert 7.9 < float(str(record.notes["epsilon"])) <= 8.0
    execute(recipe, tmp_path / "local")
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "local")]
    assert files[0] != files[1]
    page = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "by noise of the server's on sums" in page
    assert "whoever has the recipe" not in page


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": {"name": "fedit"}}, "the strategy 'fedit' does not go"),
    ({"strategy": {"name": "best-rank"}}, "the strategy 'best-rank' does not go"),
    ({"federation": {"rounds": 2}}, "federation.weighting = 'examples' does not go"),
    ({"federation": {"rounds": 2, "weighting": "uniform", "uplink": "int8"}}, "federation.uplink does not go"),
    (
        {"privacy": {"secure_aggregation": True}, "model": {"client_ranks": [2, 1]}},
        "model.client_ranks does not go",
    ),
    ({"evaluate": {"personal": "last"}}, "evaluate.personal does not go"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_what_noise_on_sums_does_not_go_with_is_refused(
    change: dict[str, Any], told: str, recipe_table: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=told):
        private(recipe_table, **change)


def test_a_delta_as_large_as_a_client_is_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no less than 1 / 4, the share of one client"):
        execute(private(recipe_table, privacy={"delta": 0.3}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
