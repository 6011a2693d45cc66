"""[privacy] unit = "examples": what leaves a client is DP-SGD's, its cost is on the disk first, and ends the run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from florana.dp.accounting import Budget, Mechanism, epsilon_of, noise_for
from florana.dp.ledger import Charge, Ledger
from florana.dp.noise import Draws
from florana.errors import BudgetSpent, FederationError, FloranaError, InputError, RecipeError
from florana.federation.event import Event
from florana.federation.gather import briefs_of
from florana.federation.journal import read_records
from florana.federation.messages import Brief
from florana.lora.factors import Adapter
from florana.recipe.schema import Recipe, Train
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import Setup, prepare
from florana.runs.private_runs import LEDGER, mechanisms, private_here, private_site
from florana.runs.setup import clients_of, execute, federation_of, first_state
from florana.train.model import Workbench
from florana.train.own_streams import OwnStreams
from florana.train.private_clients import PrivateClients
from florana.train.private_steps import Noise, clipped_sums, train_privately
from florana.train.stacked import Present, Stack
from tests.test_cohort import Member, alone, in_double, language, made, started, started_single, without_dropout

BUDGET: dict[str, Any] = {"unit": "examples", "epsilon": 8.0, "delta": 1e-3, "clip": 0.5, "accountant": "rdp"}


def private(table: dict[str, Any], **sections: Any) -> Recipe:
    budget = {**BUDGET, **sections.pop("privacy", {})}
    plain = {"evaluate": {"personal": "never"}, "privacy": {k: v for k, v in budget.items() if v is not None}}
    return made(table, **{**plain, **sections})


# -- how much noise


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Balle and Wang 2018, equation 6: the least delta of the Gaussian mechanism of sensitivity 1."""
    a, b = 1 / (2 * sigma), epsilon * sigma
    return float(stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b))


def sampled_delta(rate: float, sigma: float, epsilon: float) -> float:
    """One sampled step: the larger of both directions' hockey sticks, by quadrature."""

    def mixed(x: float) -> float:
        return (1 - rate) * float(stats.norm.pdf(x, 0, sigma)) + rate * float(stats.norm.pdf(x, 1, sigma))

    def stick(first: Any, second: Any) -> float:
        def beyond(x: float) -> float:
            return max(0.0, float(first(x)) - math.exp(epsilon) * float(second(x)))

        return float(integrate.quad(beyond, -12 * sigma, 1 + 12 * sigma, limit=500, epsabs=1e-12)[0])

    plain = stats.norm(0, sigma).pdf
    return max(stick(mixed, plain), stick(plain, mixed))


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (3.0, 7), (12.0, 100)])
def test_epsilon_is_the_gaussian_mechanisms(sigma: float, steps: int) -> None:
    """All rows in each step: so many releases are one of sigma / sqrt(steps), of which the curve is known."""
    found = epsilon_of([Mechanism(1.0, sigma, steps)], 1e-5)
    true = gaussian_delta(sigma / math.sqrt(steps), found)
    assert true <= 1e-5 < gaussian_delta(sigma / math.sqrt(steps), 0.98 * found)
    assert found < epsilon_of([Mechanism(1.0, sigma, steps)], 1e-5, "rdp")


@pytest.mark.parametrize(("rate", "sigma"), [(0.1, 0.7), (0.5, 1.5)])
def test_sampling_counts_as_what_it_is(rate: float, sigma: float) -> None:
    found = epsilon_of([Mechanism(rate, sigma, 1)], 1e-5)
    assert sampled_delta(rate, sigma, found) <= 1.01e-5
    assert sampled_delta(rate, sigma, 0.97 * found) > 1e-5
    assert found < epsilon_of([Mechanism(1.0, sigma, 1)], 1e-5)


def test_steps_add_up_however_they_are_written() -> None:
    at_once = epsilon_of([Mechanism(0.1, 1.0, 60)], 1e-5)
    assert epsilon_of([Mechanism(0.1, 1.0, 20)] * 3, 1e-5) == at_once
    assert epsilon_of([Mechanism(0.1, 1.0, 60), Mechanism(0.2, 1.0, 1)], 1e-5) > at_once


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_noise_fits_and_no_less_would(accountant: Any) -> None:
    for rate, steps, epsilon in ((0.05, 100, 8.0), (0.3, 60, 1.0), (1.0, 5, 0.1)):
        sigma = noise_for(rate, steps, Budget(epsilon, 1e-5, accountant))
        assert 0.99 * epsilon < epsilon_of([Mechanism(rate, sigma, steps)], 1e-5, accountant) <= epsilon
    with pytest.raises(RecipeError, match="no noise makes 1000 steps"):
        noise_for(0.5, 1000, Budget(1e-7, 1e-9, accountant))


# -- what is released


def one_by_one(bench: Workbench, adapter: Adapter, rows: Any, clip: float, trains: Any, blocks: Any) -> list[Tensor]:
    """The clipped sum by PEFT's own layers: one row at a time through the model, one backward pass each."""
    bench.load(adapter, None, trains, blocks)
    bench.model.train()
    parameters = bench.trainable
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for row in rows:
        for parameter in parameters:
            parameter.grad = None
        bench.forward(bench.batch([row])).loss.backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        scale = min(1.0, clip / math.sqrt(sum(float(grad.double().square().sum()) for grad in grads)))
        total = [t + scale * grad for t, grad in zip(total, grads, strict=True)]
    return total


CASES: dict[str, dict[str, Any]] = {
    "pairs and a head": {},
    "b alone": {"trains": ("B", "extra")},
    "dora": {"model": {"variant": "dora"}},
    "core": {"core": 1, "trains": ("core",)},
    "own blocks of cores": {"core": 2, "trains": ("core", "scale"), "blocks": [1]},
    "language": {"language": True},
}


@pytest.mark.parametrize("clip", [1e6, 0.05])
@pytest.mark.parametrize("case", CASES)
def test_each_rows_gradient_is_the_one_it_has_alone(
    case: str, clip: float, recipe_table: dict[str, Any], tiny_llama: Path
) -> None:
    given = CASES[case]
    table = language(recipe_table, tiny_llama) if given.get("language") else recipe_table
    setup = prepare(made(table, model={**given.get("model", {})}))
    without_dropout(setup.bench)
    if not given.get("language"):
        in_double(setup.bench)
    trains, blocks = given.get("trains", ("A", "B", "extra")), given.get("blocks")
    adapter = (started_single if given.get("language") else started)(setup.bench, 5, given.get("core", 0))
    rows = setup.clients["client-0"].bins[:7]
    apart = one_by_one(setup.bench, adapter, rows, clip, trains, blocks)
    present = Present(torch.arange(3), True, OwnStreams([0, 1, 2], setup.bench.device))
    stack = Stack(setup.bench, [adapter] * 3, trains, [blocks] * 3, present)  # pieces of 3, 3 and 1
    with stack.placed():
        sums = clipped_sums(setup.bench, stack, present, rows, Train(steps=1), clip)
    near = 2e-5 if given.get("language") or "core" in trains else 1e-9
    whole = math.sqrt(sum(float(t.double().square().sum()) for t in apart))
    assert whole > 0
    left = sorted(float(t.double().norm()) for t in apart if float(t.norm()))
    right = sorted(float(t.double().norm()) for t in sums if float(t.norm()))
    assert left == pytest.approx(right, rel=near)
    total = sorted(float(t.double().sum()) for t in apart if float(t.norm()))
    assert total == pytest.approx(sorted(float(t.double().sum()) for t in sums if float(t.norm())), abs=near * whole)


def test_without_noise_and_clip_it_is_plain_training(recipe_table: dict[str, Any]) -> None:
    """All rows in each step: the clients' own training, proximal term, schedule and all."""
    setup = prepare(made(recipe_table))
    without_dropout(setup.bench)
    in_double(setup.bench)
    rows = setup.clients["client-1"].bins
    settings = Train(steps=4, batch_size=len(rows), learning_rate=0.02, proximal_mu=2.0, lr_schedule="linear",
                     max_grad_norm=0.3, loraplus_lr_ratio=3.0)  # fmt: skip
    adapter = started(setup.bench, 1)
    noise, trains = Noise(1e9, 0.0, bytes(32)), ("A", "B", "extra")
    setup.bench.load(adapter)
    own = train_privately(setup.bench, adapter, rows, settings, trains, noise, place=(2, 3))
    plain = alone(setup.bench, Member(adapter, rows, 0), settings, trains)
    for name, tensor in plain.items():
        assert float((own[name] - tensor).abs().max()) < 1e-9, name


def test_noise_is_as_wide_as_said_and_falls_on_all_that_is_trained(recipe_table: dict[str, Any]) -> None:
    """SGD of rate 1 with nothing else: what moves is -(clipped sum + sigma C z) / L."""
    setup = prepare(made(recipe_table))
    rows, adapter = setup.clients["client-0"].bins, setup.bench.adapter()
    settings = Train(steps=1, batch_size=5, optimizer="sgd", momentum=0.0, learning_rate=1.0, max_grad_norm=None)
    moved = []
    for key in range(40):
        setup.bench.load(adapter)
        noise = Noise(1e-3, 2000.0, key.to_bytes(32, "big"))
        own = train_privately(setup.bench, adapter, rows, settings, ("A", "B", "extra"), noise)
        before = adapter.tensors()
        moved.append(torch.cat([(own[name] - before[name]).flatten() for name in sorted(before)]))
    drawn = torch.stack(moved).double().numpy() * 5 / 2.0  # L = 5, sigma C = 2
    assert stats.kstest(drawn.ravel()[:20000], "norm").pvalue > 1e-3
    assert np.abs(drawn.std(0).mean() - 1) < 0.02
    assert np.abs(np.corrcoef(drawn[:20])[np.triu_indices(20, 1)]).max() < 5 / math.sqrt(drawn.shape[1])


def test_dropout_comes_from_the_secret_key(recipe_table: dict[str, Any]) -> None:
    """Every row in each step and no noise: what differs is which numbers were dropped, row by row."""
    setup = prepare(made(recipe_table))
    rows, adapter = setup.clients["client-0"].bins, setup.bench.adapter()
    settings = Train(steps=1, batch_size=len(rows), optimizer="sgd", momentum=0.0, learning_rate=1.0)

    def moved(key: int) -> torch.Tensor:
        setup.bench.load(adapter)
        noise = Noise(1e9, 0.0, key.to_bytes(32, "big"))
        own = train_privately(setup.bench, adapter, rows, settings, ("A", "B", "extra"), noise)
        return torch.cat([own[name].flatten() for name in sorted(own)])

    assert torch.equal(moved(1), moved(1))
    assert not torch.allclose(moved(1), moved(2))
    without_dropout(setup.bench)
    assert torch.equal(moved(1), moved(2))


def test_rows_are_sampled_each_on_its_own() -> None:
    draws = Draws(bytes(31) + b"\x07")
    taken = [draws.chosen(50, 0.2) for _ in range(2000)]
    counts = np.bincount(np.concatenate(taken), minlength=50)
    assert stats.chisquare(counts).pvalue > 1e-3
    sizes = np.array([len(rows) for rows in taken])
    assert abs(sizes.var() - 50 * 0.2 * 0.8) < 0.8  # a binomial's, not a fixed number


# -- what is written down


def test_a_ledger_counts_each_release_once_and_outlives_a_cut_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x" / "privacy.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        ledger.charges()
    ledger.begin()
    first = Charge("a", 1, "one", 0.1, 1.0, 5)
    for charge in (first, first, Charge("a", 2, "two", 0.1, 1.0, 5), Charge("b", 1, "three", 0.2, 1.0, 5)):
        ledger.add(charge)
    assert ledger.charges("a") == [first, Charge("a", 2, "two", 0.1, 1.0, 5)]
    with ledger.path.open("ab") as stream:
        stream.write(b'{"client": "a", "rou')  # a kill in the middle: nothing left for it
    ledger.begin()
    ledger.add(Charge("a", 3, "four", 0.1, 1.0, 5))
    assert [charge.release for charge in ledger.charges()] == ["one", "two", "three", "four"]
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    for bad in (b"{}\n", b'["a"]\n', json.dumps(dataclasses.asdict(first) | {"noise_multiplier": 0}).encode() + b"\n"):
        ledger.path.write_bytes(bad)
        with pytest.raises(InputError, match="restore the file"):
            ledger.charges()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_charge_is_whole_on_the_disk_or_refused(tmp_path: Path) -> None:
    """A disk with room for a part of the line takes that part, and says so only when it is asked for the rest."""
    import resource

    ledger = Ledger(tmp_path / "privacy.jsonl")
    ledger.begin()
    first, second = (Charge("a", n, f"r{n}", 0.1, 1.0, 5) for n in (1, 2))
    ledger.add(first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 10, hard))
    try:
        with pytest.raises(FederationError, match="nothing leaves"):
            ledger.add(second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(FederationError, match="half a line"):
        ledger.add(second)  # nothing leaves before a new start: workers share the file, so none of them mends it
    ledger.begin()
    ledger.add(second)
    assert [charge.round for charge in ledger.charges()] == [1, 2]


def events(recipe: Recipe, folder: Path, **named: Any) -> list[Event]:
    seen: list[Event] = []
    execute(recipe, folder, show=seen.append, **named)
    return seen


def test_a_run_ends_before_the_round_that_no_budget_covers(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """Noise for two rounds, and a recipe of three: two are committed, and going on commits no more."""
    recipe = private(recipe_table, privacy={"max_rounds": 2}, federation={"rounds": 5, "clients_per_round": 4})
    ended = [event for event in events(recipe, tmp_path / "run") if event.kind == "ended"]
    assert len(ended) == 1
    assert "the privacy budget is spent" in ended[0].detail
    assert "another would make it" in ended[0].detail
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    assert [record.round for record in records] == [1, 2]
    assert records[-1].train_loss is None
    assert records[-1].notes["epsilon"] <= 8.0
    charges = Ledger(tmp_path / "run" / LEDGER).charges()
    for client in {charge.client for charge in charges}:
        own = [charge.mechanism for charge in charges if charge.client == client]
        assert len(own) == 2
        assert 7.9 < epsilon_of(own, 1e-3, "rdp") <= 8.0
    assert [event.kind for event in events(recipe, tmp_path / "run", resume=True)].count("ended") == 1
    assert len(read_records(tmp_path / "run" / "rounds.jsonl")) == 2


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("strategy", [{"name": "fedit"}, {"name": "best-rank", "source": "sums"}])
def test_two_sittings_and_two_processes_end_in_the_same_bytes(
    strategy: dict[str, Any], recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = private(recipe_table, strategy=strategy)
    execute(recipe, tmp_path / "one")
    execute(recipe, tmp_path / "two", until=1)
    execute(recipe, tmp_path / "two", resume=True)
    execute(made(recipe.model_dump(exclude_none=True), engine={"workers": 2}), tmp_path / "three")
    for other in ("two", "three"):
        assert adapter_bytes(tmp_path / other) == adapter_bytes(tmp_path / "one")
        assert {c.release for c in Ledger(tmp_path / other / LEDGER).charges()} == {
            c.release for c in Ledger(tmp_path / "one" / LEDGER).charges()
        }
    quiet = private(recipe_table, strategy=strategy, privacy={"noise_multiplier": 1e-6, "epsilon": 1e12})
    execute(quiet, tmp_path / "quiet")
    assert adapter_bytes(tmp_path / "quiet") != adapter_bytes(tmp_path / "one"), "the noise must be in it"


# -- a client, whatever it is asked


def at(recipe: Recipe, setup: Setup, folder: Path, *, site: bool) -> tuple[PrivateClients, Brief]:
    """The clients of a simulation or of sites, and a brief of the first round for one of them."""
    strategy = strategy_of(recipe, sorted(setup.clients))
    begun = first_state(recipe, setup, strategy)
    plain, rounds = clients_of(recipe, setup, begun), mechanisms(recipe, setup.examples)
    federation = federation_of(recipe, setup, sorted(setup.clients), setup.examples)
    (brief,) = briefs_of(strategy, {"client-0": strategy.brief(begun, "client-0")}, 1, federation)
    if site:
        return private_site(recipe, plain, rounds, folder), brief
    Ledger(folder / LEDGER).begin()
    return private_here(recipe, plain, rounds, folder), brief


def test_a_site_tells_no_figure_of_its_rows_and_stops_whatever_it_is_asked(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = private(recipe_table, privacy={"max_rounds": 3})
    setup = prepare(recipe)
    site, brief = at(recipe, setup, tmp_path / "kept", site=True)
    replies = []
    for round_ in (1, 1, 7):  # the same round again, another: each costs as much
        asked = dataclasses.replace(brief, round=round_, evaluate=True)
        reply, _ = site.fit(asked, {})
        replies.append(reply)
        assert reply.metrics.keys() == {"epsilon"}
    spent = [reply.metrics["epsilon"] for reply in replies]
    assert spent == sorted(spent)
    assert 7.9 < spent[-1] <= 8.0
    assert replies[0].payload != replies[1].payload, "the same request must get other draws"
    before = (tmp_path / "kept" / LEDGER).read_bytes()
    steps: list[str] = []
    site.clients.step = steps.append
    for asked in (brief, dataclasses.replace(brief, seed=1, round=2), dataclasses.replace(brief, trains=["A"])):
        with pytest.raises(BudgetSpent, match="the privacy budget of 'client-0' is spent: 7"):
            site.fit(asked, {})
    assert steps == []
    assert (tmp_path / "kept" / LEDGER).read_bytes() == before
    again, _ = at(recipe, setup, tmp_path / "kept", site=True)  # started anew, it knows
    with pytest.raises(BudgetSpent):
        again.fit(brief, {})


def test_a_site_without_its_ledger_takes_no_part(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = private(recipe_table)
    setup = prepare(recipe)
    site, brief = at(recipe, setup, tmp_path / "kept", site=True)
    (tmp_path / "kept" / "answer").write_bytes(b"an update that was sent")
    (tmp_path / "kept" / LEDGER).unlink()
    with pytest.raises(InputError, match="shows that this site has taken part before"):
        at(recipe, setup, tmp_path / "kept", site=True)
    with pytest.raises(InputError, match="cannot be read"):  # it went while the site was running
        site.fit(brief, {})


def test_what_cannot_be_written_down_does_not_leave(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = private(recipe_table)
    site, brief = at(recipe, prepare(recipe), tmp_path / "kept", site=True)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FederationError, match="so nothing leaves"):
        site.fit(brief, {})


def test_a_training_that_fails_is_charged(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """That it failed is told, and may depend on one row."""
    recipe = private(
        recipe_table, train={"learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": 1e38}, privacy={"clip": 1e10}
    )
    clients, brief = at(recipe, prepare(recipe), tmp_path, site=False)
    with pytest.raises(FloranaError, match="training loss became nan"):
        clients.fit(brief, {})
    assert len(Ledger(tmp_path / LEDGER).charges()) == 1


# -- with secure sums, and what is refused


def test_with_secure_sums_no_loss_and_no_epsilon_is_told(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("Crypto", reason="the extra 'secure' is not installed")
    recipe = private(
        recipe_table,
        privacy={"secure_aggregation": True, "max_rows": 500, "max_rounds": 2},
        strategy={"name": "best-rank", "source": "sums"},
        federation={"rounds": 4, "clients_per_round": 4, "min_clients": 3},
    )
    ended = [event for event in events(recipe, tmp_path / "run") if event.kind == "ended"]
    assert len(ended) == 1
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    assert [(record.round, record.train_loss) for record in records] == [(1, None), (2, None)]
    assert "epsilon" not in records[0].notes, "it would tell the rows"
    assert len(Ledger(tmp_path / "run" / LEDGER).charges()) == 8


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"privacy": {"epsilon": None}}, "needs privacy.epsilon too"),
    ({"privacy": {"clip": 0}}, "privacy.clip"),
    ({"privacy": {"epsilon": -1}}, "privacy.epsilon"),
    ({"privacy": {"delta": 1.0}}, "privacy.delta"),
    ({"privacy": {"unit": "people"}}, "privacy.unit"),
    ({"privacy": {"unit": None}}, "no meaning without privacy.unit"),
    ({"privacy": {"noise_multiplier": 1.0, "max_rounds": 3}}, "max_rounds has no meaning"),
    ({"evaluate": {"personal": "last"}}, "evaluate.personal does not go"),
    ({"train": {"neftune_noise_alpha": 5.0}}, "train.neftune_noise_alpha does not go"),
    ({"engine": {"cohort": 4}}, "engine.cohort does not go"),
    ({"model": {"gradient_checkpointing": True}}, "model.gradient_checkpointing does not go"),
    ({"strategy": {"name": "fed-sb", "begin": "gradient"}}, "strategy.begin = 'gradient' does not go"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_recipe_that_noise_does_not_go_with_is_refused(
    change: dict[str, Any], told: str, recipe_table: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=told):
        private(recipe_table, **copy.deepcopy(change))


@pytest.mark.parametrize(
    ("privacy", "told"),
    [({"delta": 0.2}, "no less than 1 / "), ({"epsilon": 1e-7, "delta": 1e-9}, "no noise makes 9 steps")],
)
def test_a_budget_that_cannot_be_had_is_said_before_anything_is_written(
    privacy: dict[str, Any], told: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        execute(private(recipe_table, privacy=privacy), tmp_path / "run")
    assert not (tmp_path / "run").exists()


KINDS: dict[str, dict[str, Any]] = {
    "pruning": {"strategy": {"name": "hetlora"}, "model": {"head": "personal", "client_ranks": [2, 1]}},
    "blocks of cores": {
        "strategy": {"name": "ravan", "heads": 3, "size": 2, "heads_per_client": 1}, "model": {"rank": 6},
    },
    "fixed factors": {"strategy": {"name": "fed-sb", "begin": "principal"}},
    "a part in the base": {"strategy": {"name": "fedex-lora"}, "server": {"optimizer": "momentum"}},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_methods_of_every_kind_go_with_noise(kind: str, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """In scripts all nineteen were run once; these are the kinds of what is trained."""
    recipe = private(recipe_table, **KINDS[kind], federation={"rounds": 2, "clients_per_round": 4})
    execute(recipe, tmp_path / "run")
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    assert len(records) == 2
    assert 7.9 < float(str(records[-1].notes["epsilon"])) <= 8.0
