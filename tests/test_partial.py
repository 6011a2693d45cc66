"""Pruned ranks and chosen heads in real training."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from florana.federation.gate import Expected, validate
from florana.federation.messages import Brief, pack, unpack
from florana.lora.factors import Adapter, LoraFactors
from florana.recipe.load import check
from florana.runs.chosen_strategy import strategy_of
from florana.runs.dry_run import plan
from florana.runs.prepared import prepare
from florana.runs.setup import begin, execute
from florana.strategy.base import Payload, Pruning
from florana.train.client import TrainingClients, train_locally
from florana.train.data.tokenize import collate
from florana.train.evaluate import evaluate
from florana.train.pruning import penalty_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# --- ranks that clients prune ----------------------------------------------------------------------------------------


@pytest.fixture
def table(recipe_table: dict[str, Any]) -> dict[str, Any]:
    recipe_table["model"]["rank"] = 4
    return recipe_table


def clients_of(table: dict[str, Any], first: Adapter | None = None) -> tuple[Any, TrainingClients]:
    recipe = check(table, "test")
    setup = prepare(recipe)
    begun = first or Adapter(setup.start.modules, setup.head)
    return setup, TrainingClients(
        setup.bench, begun, setup.clients, setup.common, recipe.train, recipe.evaluate, "average"
    )


def moved(adapter: Adapter, size: float = 0.1) -> Adapter:
    """The adapter with a B that is not zero."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        n: LoraFactors(size * torch.randn(p.B.shape, generator=generator), p.A, p.scaling)
        for n, p in adapter.modules.items()
    }
    return Adapter(modules, adapter.extra)


def test_the_clients_loss_has_the_tail_in_it_and_the_report_has_not(table: dict[str, Any]) -> None:
    """Against the same steps written with nothing but torch."""
    setup, _ = clients_of(table)
    recipe, rows, start = check(table, "test"), setup.clients["client-0"].train, moved(setup.start)
    setup.bench.load(start)
    term = penalty_of(setup.bench.factors, Pruning(1, 0.7))
    loss = train_locally(setup.bench, rows, recipe.train, 3, lambda: None, term)
    ours = setup.bench.adapter()
    setup.bench.load(start)
    setup.bench.model.train()
    optimizer = torch.optim.AdamW(setup.bench.trainable, lr=0.01, weight_decay=0.0)
    pairs = [
        (setup.bench.model.get_parameter(f"base_model.model.{n}.lora_B.default.weight"),
         setup.bench.model.get_parameter(f"base_model.model.{n}.lora_A.default.weight")) for n in start.modules
    ]  # fmt: skip
    order, losses = np.random.default_rng(3).permutation(len(rows)).tolist(), []
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(3):
            chosen, order = order[:8], order[8:]
            plain = setup.bench.forward(collate([rows[i] for i in chosen], 0, torch.device("cpu"))).loss
            losses.append(float(plain.detach()))
            beyond = sum((B[:, 1:] ** 2).sum().sqrt() * (A[1:] ** 2).sum().sqrt() for B, A in pairs)
            (plain + 0.7 * beyond).backward()
            torch.nn.utils.clip_grad_norm_(setup.bench.trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    written = setup.bench.adapter()
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    for name, pair in ours.modules.items():
        assert torch.allclose(pair.A, written.modules[name].A, atol=1e-4)
        assert torch.allclose(pair.B, written.modules[name].B, atol=1e-4)
    setup.bench.load(start)
    train_locally(setup.bench, rows, recipe.train, 3, lambda: None)
    assert any(not torch.allclose(p.B, ours.modules[n].B, atol=1e-3) for n, p in setup.bench.adapter().modules.items())


def test_a_client_prunes_where_its_tail_became_smaller_and_is_measured_as_it_sent(table: dict[str, Any]) -> None:
    setup, clients = clients_of(table)
    start = moved(Adapter(setup.start.modules, setup.head))
    brief = Brief(2, "client-0", 5, pack(start), True, ["A", "B"], ["A", "B"], start.scalings,
                  pruning=Pruning(3, 50.0))  # fmt: skip
    reply, _ = clients.fit(brief, {})
    answer, _ = unpack(reply.payload, start, {}, start.scalings)
    assert {(pair.rank, pair.scaling) for pair in answer.modules.values()} == {(3, 1.5)}
    setup.bench.load(answer)
    scores = evaluate(setup.bench, setup.common, 64)
    assert reply.metrics["clients_on_common/loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert validate(reply, Expected(2, {"client-0": Payload(start, pruning=brief.pruning)}), set())
    first = dataclasses.replace(brief, payload=pack(Adapter(setup.start.modules, setup.head)))  # B = 0: no tail yet
    for asked in (first, dataclasses.replace(brief, pruning=None)):
        whole, _ = unpack(clients.fit(asked, {})[0].payload, start, {}, start.scalings)
        assert {pair.rank for pair in whole.modules.values()} == {4}


def test_heads_that_were_not_chosen_act_but_do_not_move(table: dict[str, Any]) -> None:
    """Not by a gradient, and not by the optimizer's weight decay either."""
    setup, _ = clients_of(table)
    generator = torch.Generator().manual_seed(1)
    drawn = {
        n: LoraFactors(torch.randn(p.shape[0], 6, generator=generator), torch.randn(6, p.shape[1], generator=generator),
                       0.5) for n, p in setup.start.modules.items()
    }  # fmt: skip
    cores = {name: torch.randn(3, 2, 2, generator=generator) for name in drawn}
    adapter = Adapter(drawn, setup.head, cores)
    trains = ["core", "scale"]
    setup.bench.load(adapter, None, trains, blocks=(2, 0))
    some = evaluate(setup.bench, setup.common, 16)
    shapes = sorted(tuple(p.shape) for p in setup.bench.trainable)
    assert shapes == sorted([*[(2, 2, 2), (2,)] * len(cores), *(tuple(t.shape) for t in setup.head.values())])
    settings = check(table, "test").train.model_copy(update={"weight_decay": 0.5})
    train_locally(setup.bench, setup.clients["client-0"].train, settings, 3, lambda: None)
    for name, core in setup.bench.adapter().cores.items():
        assert torch.equal(core[1], cores[name][1])
        assert not torch.allclose(core[0], cores[name][0])
        assert not torch.allclose(core[2], cores[name][2])
    setup.bench.load(adapter, None, trains)
    assert evaluate(setup.bench, setup.common, 16)["loss"] == pytest.approx(some["loss"], rel=1e-6)
    setup.bench.load(Adapter(drawn, setup.head, {n: c * torch.tensor([1.0, 0, 1])[:, None, None] for n, c in
                                                 cores.items()}), None, trains)  # fmt: skip
    assert abs(evaluate(setup.bench, setup.common, 16)["loss"] - some["loss"]) > 1e-5


@pytest.mark.parametrize(
    ("strategy", "model"),
    [
        ({"name": "ravan", "heads": 3, "size": 2, "heads_per_client": 2}, {}),
        ({"name": "ravan", "heads": 2, "size": 2}, {"client_ranks": [2, 4]}),
        ({"name": "hetlora", "gamma": 0.5, "penalty": 0.5}, {}),
        ({"name": "hetlora", "gamma": 0.5, "penalty": 0.5}, {"client_ranks": [4, 2]}),
    ],
    ids=["ravan, two heads", "ravan, ranks", "hetlora", "hetlora, ranks"],
)
def test_a_real_run_plans_its_bytes_resumes_and_prunes(
    strategy: dict[str, Any], model: dict[str, Any], table: dict[str, Any], tmp_path: Path
) -> None:
    table["strategy"] = strategy
    table["model"] |= model
    table["federation"] = {"rounds": 3, "clients_per_round": 4}
    table["train"] |= {"weight_decay": 30.0}  # shrinks the tails fast enough for three rounds
    recipe = check(table, "test")
    setup = prepare(recipe)
    planned = plan(recipe, setup, timed_steps=1)
    whole = execute(recipe, tmp_path / "one", setup=setup)
    chosen = strategy_of(recipe, sorted(setup.clients))
    begun = chosen.init(begin(recipe, setup, chosen))
    counts = []
    for client in setup.clients:
        sent = chosen.brief(begun, client)
        setup.bench.load(sent.adapter, None, sent.work.trains, sent.blocks)
        counts.append(sum(parameter.numel() for parameter in setup.bench.trainable))
    assert planned.trainable_parameters == max(counts)
    assert (planned.bytes_up, planned.bytes_down) == (whole.records[0].bytes_up, whole.records[0].bytes_down)
    table["federation"]["rounds"] = 1
    execute(check(table, "test"), tmp_path / "two", setup=setup)
    execute(recipe, tmp_path / "two", setup=setup, resume=True)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert [dict(r.refused) for r in whole.records] == [{}] * 3
    if strategy["name"] == "hetlora":
        ranks = [record.notes["ranks"] for record in whole.records]
        start = [4, 2, 4, 2] if model else [4] * 4
        assert ranks[0] == start, "the first training starts at B = 0 and must not prune"
        assert ranks[1] != start, "nobody pruned"
        for before, after in itertools.pairwise(ranks):
            assert all(new in (old, max(1, old // 2)) for old, new in zip(before, after, strict=True))
        if sum(ranks[2]) <= sum(ranks[1]) < sum(start):
            assert whole.records[1].bytes_up < whole.records[0].bytes_up
            assert whole.records[2].bytes_down < whole.records[1].bytes_down
    else:
        assert len({record.bytes_up for record in whole.records}) == 1
        assert whole.records[0].bytes_up < whole.records[0].bytes_down
