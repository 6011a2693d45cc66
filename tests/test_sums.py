"""Methods that work on sums alone: what two trips make of the clients' products, and of those who leave."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from florana.aggregate.best_rank import sketch
from florana.aggregate.best_rank.project import best_rank
from florana.aggregate.error import measure
from florana.errors import FederationError, FloranaError, RecipeError
from florana.federation.event import Event
from florana.federation.journal import Journal, read_records
from florana.federation.loop import run_rounds
from florana.federation.messages import Brief, Failure, Reply
from florana.federation.sampling import sample
from florana.federation.spool import Spool
from florana.federation.trip_memory import RECEIVED, UPDATE, lasting, measured, own, update_of
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.recipe.load import check
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.strategy import STRATEGIES
from florana.strategy.base import State, Strategy
from florana.strategy.ranks import with_ranks
from florana.strategy.two_trips import seen
from tests.federation import CARD, CLIENTS, FakeEngine, federation, first_adapter, noisy, run
from tests.method_cases import RANKS, scaling_of, start_of, trained, truth_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SUMS = "best-rank from sums"


def dense_mean(adapter: Adapter, module: str) -> np.ndarray:
    pair = adapter.modules[module]
    return pair.scaling * pair.B.double().numpy() @ pair.A.double().numpy()


def near_clients(
    seed: int, count: int, rank: int, shape: tuple[int, int], moved: float
) -> tuple[Adapter, list[Contribution]]:
    """Clients that trained from one A and B = 0, in float64; unequal weights, scaling 3 / rank."""
    rng = np.random.default_rng(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=size))

    start = Adapter(
        {"q": LoraFactors(torch.zeros(shape[0], rank, dtype=torch.float64), drawn(rank, shape[1]), 3 / rank)}
    )
    parts = []
    for client in range(count):
        pair = start.modules["q"]
        own_pair = LoraFactors(drawn(shape[0], rank), pair.A + moved * drawn(rank, shape[1]), pair.scaling)
        parts.append(Contribution(f"c{client}", Adapter({"q": own_pair}), float(1 + client)))
    return start, parts


@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 3),
    st.tuples(st.integers(3, 12), st.integers(3, 12)),
    st.integers(1, 8),
)
def test_two_trips_give_what_halko_and_others_say(
    seed: int, count: int, rank: int, shape: tuple[int, int], k: int
) -> None:
    """Q Q^T T against numpy's own QR of the dense T Omega, for any width; the whole T where k covers a side."""
    start, parts = near_clients(seed, count, rank, shape, 0.3)
    strategy = STRATEGIES["best-rank"](source="sums", sketch=k)
    (mean,) = seen(strategy, State(4, start), parts)
    truth = truth_of(parts, "q")
    wide = min(k, *shape)
    omega = sketch.directions(start.modules["q"].A, wide, shape[1], "q 5").numpy()
    assert np.allclose(omega.T @ omega, np.eye(wide))
    Q = np.linalg.qr(truth @ omega)[0]
    wanted = Q @ Q.T @ truth
    got = dense_mean(mean.adapter, "q")
    if np.linalg.cond(truth @ omega) < 1e3:  # a range that float32 can tell
        assert np.linalg.norm(got - wanted) <= 2e-4 * np.linalg.norm(truth)
    if wide == min(shape) and np.linalg.cond(truth @ omega) < 1e3:
        assert np.linalg.norm(got - truth) <= 2e-4 * np.linalg.norm(truth)


def test_the_first_columns_are_the_rows_of_a_and_the_rest_is_the_seeds() -> None:
    A = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    omega = sketch.directions(A, 5, 9, "layer 1")
    assert torch.allclose(omega @ (omega.T @ A.double().T), A.double().T)  # A's rows lie in it
    assert torch.equal(omega, sketch.directions(A, 5, 9, "layer 1"))
    assert not torch.allclose(omega[:, 3:], sketch.directions(A, 5, 9, "layer 2")[:, 3:])
    short = sketch.directions(A, 3, 9, "x")
    assert torch.allclose(omega[:, :3] @ omega[:, :3].T, short @ short.T)


@pytest.mark.parametrize("count", [3, 10])
def test_near_the_optimum_where_clients_start_from_one_a(count: int) -> None:
    """Six times as many directions as the rank holds, in modules of real sides; FedIT for comparison."""
    worst = 0.0
    for seed in range(3):
        start, parts = near_clients(seed, count, 8, (384, 384), 0.3)
        adapter = (
            STRATEGIES["best-rank"](source="sums")
            .step(State(0, start), seen(STRATEGIES["best-rank"](source="sums"), State(0, start), parts))
            .state.adapter
        )
        found = measure(parts, adapter)
        fedit = measure(parts, STRATEGIES["fedit"]().step(State(0, start), parts).state.adapter)
        worst = max(worst, found.error / found.optimum)
        assert found.error < fedit.error
    assert worst <= 1.10, worst


@pytest.mark.parametrize("weights", ["uniform", "rows"])
@pytest.mark.shared
def test_real_adapters_of_a_first_round(weights: str, shared: Path) -> None:
    """MiniLM's clients on AG News: the mean A stands for the first A, which was not kept. Nothing is tuned to them."""
    folder = shared / "client_adapters" / "minilm-agnews-r8"
    shares = json.loads((folder / "weights.json").read_text())["weights"]
    parts = []
    for client, share in enumerate(shares):
        content = load_file(folder / f"client-{client}" / "adapter_model.safetensors")
        names = sorted(n.removesuffix(".lora_A.weight") for n in content if n.endswith(".lora_A.weight"))
        modules = {n: LoraFactors(content[f"{n}.lora_B.weight"], content[f"{n}.lora_A.weight"], 2.0) for n in names}
        parts.append(Contribution(str(client), Adapter(modules), 1.0 if weights == "uniform" else share))
    first = {
        n: LoraFactors(torch.zeros_like(p.B), sum(part.adapter.modules[n].A for part in parts) / len(parts), 2.0)  # type: ignore[arg-type]
        for n, p in parts[0].adapter.modules.items()
    }
    ratios = []
    for round_ in range(5):
        state = State(round_, Adapter(first))
        strategy = STRATEGIES["best-rank"](source="sums")
        found = measure(parts, strategy.step(state, seen(strategy, state, parts)).state.adapter)
        ratios.append(found.error / found.optimum)
    assert np.mean(ratios) <= 1.10, ratios


def test_ranks_may_differ() -> None:
    """All clients have the whole A's directions, though each was sent a part of it."""
    strategy = with_ranks(STRATEGIES["best-rank"](source="sums", sketch=6), RANKS, scaling_of)
    state = strategy.init(start_of())
    for seed in range(3):
        parts = trained(strategy, state, seed)
        assert [p.adapter.modules["layer.0.q"].rank for p in parts] == [1, 2, 4]
        (mean,) = seen(strategy, state, parts)
        # the smaller side is 6: nothing of that module is lost, though ranks and scalings differ
        truth = truth_of(parts, "layer.1.q")
        assert np.linalg.norm(dense_mean(mean.adapter, "layer.1.q") - truth) <= 1e-4 * np.linalg.norm(truth)
        state = strategy.step(state, [mean]).state


@pytest.mark.parametrize("trains", ["B", "AB"])
def test_fedask_is_exact_where_the_sketch_covers_the_sum(trains: str) -> None:
    strategy = STRATEGIES["fedask"](trains=trains, **({} if trains == "B" else {"sketch": 6}))
    state = strategy.init(start_of())
    for seed in range(3):
        parts = trained(strategy, state, seed)
        (mean,) = seen(strategy, state, parts)
        truth = truth_of(parts, "layer.1.q")
        assert np.linalg.norm(dense_mean(mean.adapter, "layer.1.q") - truth) <= 1e-4 * np.linalg.norm(truth)
        after = strategy.step(state, [mean]).state
        if trains == "B":  # the sum has rank r: nothing is cut off
            assert np.linalg.norm(dense_mean(after.adapter, "layer.1.q") - truth) <= 1e-4 * np.linalg.norm(truth)
            assert not torch.equal(after.adapter.modules["layer.1.q"].A, state.adapter.modules["layer.1.q"].A)
        state = after


def leaves_between(victim: str) -> Any:
    def answer(brief: Brief) -> Sequence[Reply | Failure]:
        return [Failure(victim, "away")] if brief.trip and brief.client == victim else [noisy(brief, SUMS)]

    return answer


def test_who_leaves_between_the_trips_is_missing_from_the_second_sum_alone(tmp_path: Path) -> None:
    """The range is everybody's, the projection the others'; against numpy, from the updates themselves."""
    chosen = sample(CLIENTS, 3, seed=7, round_=1)
    updates: dict[str, Contribution] = {}

    class Watched(FakeEngine):
        def fit(self, briefs: Sequence[Brief]) -> Any:
            for answer in super().fit(briefs):
                if isinstance(answer, Reply):
                    from tests.federation import _KEPT

                    kept = next(t for (name, _), t in _KEPT.items() if name == answer.client)
                    pair = {
                        n: LoraFactors(kept[f"{UPDATE}B/{n}"], kept[f"{UPDATE}A/{n}"], 1.5)
                        for n in first_adapter().modules
                    }
                    updates[answer.client] = Contribution(answer.client, Adapter(pair), float(answer.examples))
                yield answer

    from tests import federation as made_up

    made_up._KEPT.clear()
    strategy = STRATEGIES["best-rank"](source="sums", sketch=2)
    given_means: list[Contribution] = []

    def step(state: State, parts: Sequence[Contribution]) -> Any:
        given_means.extend(parts)
        return strategy.step(state, parts)

    made_up.VARIANTS["narrow"] = {"name": "best-rank", "source": "sums", "sketch": 2}
    engine = Watched(
        lambda brief: (
            [Failure(chosen[1], "away")] if brief.trip and brief.client == chosen[1] else [noisy(brief, "narrow")]
        )
    )
    run_rounds(
        dataclasses.replace(strategy, step=step),
        strategy.init(first_adapter()),
        engine,
        federation(1),
        Journal(tmp_path, CARD),
        lambda event: None,
    )
    del made_up.VARIANTS["narrow"]
    (record,) = read_records(tmp_path / "rounds.jsonl")
    assert record.refused == {chosen[1]: "trip 2: away"}
    assert list(record.clients) == chosen
    assert record.notes["answered"] == [3, 2]
    first = [dataclasses.replace(updates[c], weight=record.weights[c]) for c in chosen]
    left = [p for p in first if p.client != chosen[1]]
    rows = {p.client: updates[p.client].weight for p in left}  # the cap does not bind two
    left = [dataclasses.replace(p, weight=rows[p.client]) for p in left]
    for module in first_adapter().modules:
        omega = sketch.directions(
            first_adapter().modules[module].A, 2, first_adapter().modules[module].shape[1], f"{module} 1"
        )
        Q = np.linalg.qr(truth_of(first, module) @ omega.numpy())[0]
        wanted = Q @ Q.T @ truth_of(left, module)
        assert np.allclose(dense_mean(given_means[0].adapter, module), wanted, atol=1e-4 * np.linalg.norm(wanted))


def test_too_few_in_the_second_trip_is_no_round(tmp_path: Path) -> None:
    victim = sample(CLIENTS, 3, seed=7, round_=1)[1]
    with pytest.raises(FederationError, match="2 usable updates of 3 clients asked, and needs 3"):
        run(tmp_path, SUMS, 1, leaves_between(victim), minimum=3)
    assert read_records(tmp_path / "rounds.jsonl") == []


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_a_killed_round_asks_nobody_twice_in_either_trip(count: int, tmp_path: Path) -> None:
    """Killed in the second round, after one of three first answers, all, and one and two of the second ones."""
    whole = run(tmp_path / "whole", SUMS, 3)
    run(tmp_path / "cut", SUMS, 1)
    before: list[tuple[str, int | None]] = []

    class Killed(BaseException):
        """As a kill: nothing catches it."""

    def dies(brief: Brief) -> Sequence[Reply | Failure]:
        if len(before) == count:
            raise Killed
        before.append((brief.client, brief.trip))
        return [noisy(brief, SUMS)]

    with pytest.raises(Killed):
        run(tmp_path / "cut", SUMS, 3, dies)
    after: list[tuple[str, int | None]] = []

    def answer(brief: Brief) -> Sequence[Reply | Failure]:
        if brief.round == 2:
            after.append((brief.client, brief.trip))
        return [noisy(brief, SUMS)]

    ended = run(tmp_path / "cut", SUMS, 3, answer)
    assert len(before) == count
    assert not set(before) & set(after)
    assert len(before) + len(after) == 6
    assert all(torch.equal(t, ended.adapter.tensors()[n]) for n, t in whole.adapter.tensors().items())
    assert not Spool(tmp_path / "cut", 2)._folder.exists()


def test_what_is_too_large_beside_the_others_is_refused(tmp_path: Path) -> None:
    victim = sample(CLIENTS, 3, seed=7, round_=1)[1]

    def loud(brief: Brief) -> Sequence[Reply | Failure]:
        from safetensors.torch import load, save

        reply = noisy(brief, SUMS)
        if brief.client != victim or not brief.trip:
            return [reply]
        return [dataclasses.replace(reply, payload=save({n: 100 * t for n, t in load(reply.payload).items()}))]

    run(tmp_path, SUMS, 1, loud)
    (record,) = read_records(tmp_path / "rounds.jsonl")
    assert "changed projection by" in record.refused[victim]
    assert "10 times the median" in record.refused[victim]


def test_what_lies_between_the_trips_is_no_part_of_a_checkpoint_or_a_broadcast() -> None:
    kept = update_of(first_adapter(), first_adapter()) | {"B/layer.0.q": torch.ones(6, 2)}
    assert all(n.startswith((UPDATE, RECEIVED, "B/")) for n in kept)
    assert own(kept).keys() == {"B/layer.0.q"}
    assert lasting({"c": kept, "d": update_of(first_adapter(), first_adapter())}).keys() == {"c"}


def test_a_client_that_was_started_anew_says_so_and_one_of_another_strategy_too() -> None:
    strategy = STRATEGIES["best-rank"](source="sums")
    scalings = first_adapter().scalings
    brief = Brief(3, "c", 0, b"", False, ["A", "B"], ["A", "B"], scalings, trip=1)
    with pytest.raises(FloranaError, match="keeps no update of round 3"):
        measured(brief, strategy.sums, {})
    for sums, trip in ((None, 0), (strategy.sums, 2), (strategy.sums, -1)):
        with pytest.raises(FloranaError, match="does not know"):
            measured(dataclasses.replace(brief, trip=trip), sums, {})


SETTINGS: dict[str, Mapping[str, Any]] = {
    "as it is": {},
    "momentum": {"server": {"optimizer": "momentum"}},
    "int8": {"federation": {"uplink": "int8"}},
    "bfloat16": {"federation": {"uplink": "bfloat16"}},
    "mixed ranks": {"model": {"rank": 4, "client_ranks": [1, 4, 2]}},
    "personal head": {"model": {"head": "personal"}},
    "carried": {"strategy": {"name": "best-rank", "source": "sums", "carry_rank": 2}},
    "fedask": {"strategy": {"name": "fedask"}},
}


def settled(
    table: dict[str, Any], rounds: int, more: Mapping[str, Any], engine: Mapping[str, Any] | None = None
) -> Any:
    sections = {**more, "federation": {**more.get("federation", {}), "rounds": rounds}}
    if engine:
        sections["engine"] = dict(engine)
    sections.setdefault("strategy", {"name": "best-rank", "source": "sums"})
    merged = {**table}
    for section, keys in sections.items():
        merged[section] = dict(keys) if section == "strategy" else {**table.get(section, {}), **keys}
    return check(merged, "x")


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_runs_and_workers_give_the_same_bytes(
    setting: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """And the error of the step is measured, near the optimum, though the server sees sums alone."""
    more = SETTINGS[setting]
    long = settled(recipe_table, 3, more)
    setup = prepare(long)
    whole = execute(long, tmp_path / "whole", setup=setup)
    execute(settled(recipe_table, 2, more), tmp_path / "cut", setup=setup)
    execute(long, tmp_path / "cut", resume=True)
    side = execute(settled(recipe_table, 3, more, {"workers": 2}), tmp_path / "side")
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut") == weights(tmp_path / "side")
    for one, other in zip(whole.records, side.records, strict=True):
        assert not one.refused
        assert one.error["overall"] == other.error["overall"]
        assert one.error["overall"] <= 1.2 * one.error["optimum"] + 0.02
        if setting in ("int8", "bfloat16"):
            assert 0 < one.error["uplink"] < 0.05


def test_a_cohort_gives_near_the_same(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    one = execute(settled(recipe_table, 2, {}), tmp_path / "one")
    together = execute(settled(recipe_table, 2, {}, {"cohort": 3}), tmp_path / "together")
    for first, second in zip(one.records, together.records, strict=True):
        assert second.train_loss == pytest.approx(first.train_loss, rel=1e-2)  # dropout draws otherwise
        assert second.notes["answered"] == first.notes["answered"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"robust": {"rule": "clip"}}, "sums of sketches, not updates"),
        ({"strategy": {"name": "best-rank", "source": "sums", "sketch": 0}}, "sketch is 0, not at least 1"),
        ({"strategy": {"name": "best-rank", "sketch": 4}}, "is of strategy.source = 'sums'"),
        ({"strategy": {"name": "best-rank", "source": "sums", "broadcast_rank": 9}}, "do not go with"),
        ({"strategy": {"name": "best-rank", "source": "sum"}}, "'factors', 'sums'"),
        ({"strategy": {"name": "fedask"}, "model": {"client_ranks": [1, 2]}}, "share one A"),
    ],
)
def test_what_does_not_go_together_is_said(more: Mapping[str, Any], message: str, recipe_table: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        settled(recipe_table, 1, more)
    assert message in str(caught.value)


def test_the_mean_contribution_is_what_any_optimizer_moves() -> None:
    """best-rank's own step on the one mean is the best rank of it."""
    start, parts = near_clients(0, 4, 2, (9, 7), 0.3)
    strategy: Strategy = STRATEGIES["best-rank"](source="sums")
    state = State(0, start)
    (mean,) = seen(strategy, state, parts)
    step = strategy.step(state, [mean]).state.adapter
    wanted = best_rank([mean], 2)
    assert np.allclose(dense_mean(step, "q"), dense_mean(wanted, "q"), atol=1e-6)


def test_events_name_the_trip(tmp_path: Path) -> None:
    victim = sample(CLIENTS, 3, seed=7, round_=1)[0]
    told: list[Event] = []
    run(tmp_path, SUMS, 1, leaves_between(victim), show=told.append)
    assert [e.detail for e in told if e.kind == "refused"] == ["away"]


def test_best_rank_looks_elsewhere_in_every_round_and_fedask_in_the_same_directions() -> None:
    start, parts = near_clients(0, 3, 1, (9, 7), 0.3)
    for name, options, changes in (
        ("best-rank", {"source": "sums"}, True),
        ("fedask", {"sketch": 2, "trains": "AB"}, False),
    ):
        sums = STRATEGIES[name](**options).sums  # type: ignore[arg-type]
        assert sums is not None
        first, second = (sums.measure(0, round_, {}, start, parts[0].adapter)["range/q"] for round_ in (1, 2))
        assert torch.equal(first, second) != changes


def test_who_did_not_answer_the_first_trip_is_not_asked_in_the_second(tmp_path: Path) -> None:
    victim = sample(CLIENTS, 3, seed=7, round_=1)[1]
    asked: list[tuple[str, int | None]] = []

    def answer(brief: Brief) -> Sequence[Reply | Failure]:
        asked.append((brief.client, brief.trip))
        return [Failure(victim, "away")] if brief.client == victim else [noisy(brief, SUMS)]

    run(tmp_path, SUMS, 1, answer)
    assert (victim, 0) in asked
    assert (victim, 1) not in asked


@pytest.mark.parametrize("setting", ["as it is", "int8", "mixed ranks", "fedask"])
def test_a_dry_run_counts_both_trips(setting: str, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    from florana.runs.dry_run import plan

    more = SETTINGS[setting]
    everybody = {**more.get("federation", {}), "clients_per_round": 4}
    recipe = settled(recipe_table, 1, {**more, "federation": everybody})
    setup = prepare(recipe)
    told = plan(recipe, setup)
    (record,) = execute(recipe, tmp_path / "run", setup=setup).records
    assert told.bytes_up == record.bytes_up
    assert told.bytes_down == record.bytes_down


@pytest.mark.parametrize("trip", [0, 1])
def test_what_no_training_can_do_is_refused_of_one_client_alone(
    trip: int, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """Ten times the optimizer's reach, in either trip; nobody else is needed to compare with."""
    from safetensors.torch import load, save

    recipe = settled(recipe_table, 1, {"federation": {"clients_per_round": 1, "max_weight": 1.0}})
    from florana.runs import setup as runs_setup

    def lying(*given: Any, **named: Any) -> Any:
        engine = engine_of(*given, **named)
        honest = engine.fit

        def fit(briefs: Sequence[Brief]) -> Any:
            for answer in honest(briefs):
                if isinstance(answer, Reply) and briefs[0].trip == trip:
                    sent = load(answer.payload).items()
                    far = {n: t if n.startswith("extra/") else t + 1e3 for n, t in sent}
                    answer = dataclasses.replace(answer, payload=save(far))
                yield answer

        engine.fit = fit
        return engine

    engine_of = runs_setup.engine_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_setup, "engine_of", lying)
        with pytest.raises(FederationError, match="times as much as any training of this recipe can"):
            execute(recipe, tmp_path / "run")
