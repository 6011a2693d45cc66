"""A step of each method: pure, with the counts that it declares, and what is not trained comes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from florana.federation.journal import read_records
from florana.federation.messages import Brief, Failure, Reply, travelling, unpack
from florana.lora.factors import kind_of
from florana.strategy import STRATEGIES
from florana.strategy.facts import Size
from tests.federation import VARIANTS, built, first_adapter, noisy, run
from tests.method_cases import start_of, trained


@pytest.mark.parametrize("name", [*STRATEGIES, *VARIANTS])
def test_a_step_is_a_pure_function(name: str) -> None:
    strategy = built(name)
    state = strategy.init(start_of())
    parts = trained(strategy, state, 0)
    before = {n: t.clone() for n, t in state.adapter.tensors().items()}
    first, second = strategy.step(state, parts).state, strategy.step(state, parts).state
    assert (state.round, first.round) == (0, 1)
    assert all(torch.equal(t, before[n]) for n, t in state.adapter.tensors().items())
    assert all(torch.equal(t, second.adapter.tensors()[n]) for n, t in first.adapter.tensors().items())


@pytest.mark.parametrize("name", [*STRATEGIES, *VARIANTS])
def test_the_declared_counts_are_what_is_sent(name: str, tmp_path: Path) -> None:
    """Numbers in the messages, round by round, against the formulas; bytes are four a number and a small header."""
    strategy = built(name)
    shapes = {module: pair.shape for module, pair in first_adapter().modules.items()}
    seen: list[tuple[Brief, Reply]] = []

    def kept(brief: Brief) -> list[Reply | Failure]:
        reply = noisy(brief, name)
        seen.append((brief, reply))
        return [reply]

    run(tmp_path, name, 4, kept)
    trips = 1 if strategy.sums is None else strategy.sums.trips
    assert len(seen) == 12 * trips
    for brief, _ in seen:
        if brief.trip:
            continue
        both = [(b, r) for b, r in seen if (b.client, b.round) == (brief.client, brief.round)]
        assert len(both) == trips
        down = {f"{b.trip} {n}": t for b, _ in both for n, t in load(b.payload).items()}
        up = {f"{b.trip} {n}": t for b, r in both for n, t in load(r.payload).items()}
        adapter, _ = unpack(brief.payload, strategy.init(first_adapter()).adapter, {}, brief.scalings)
        held = travelling(adapter, brief.trains, brief.blocks)
        for tensors, count in ((down, strategy.facts.down), (up, strategy.facts.up), (held, None)):
            for module, (out, into) in shapes.items():
                frozen = load(brief.payload).get(f"residual/A/{module}") if tensors is not held else None
                core = adapter.cores.get(module)
                size = Size(
                    out=out,
                    into=into,
                    rank=adapter.modules[module].rank,
                    round=brief.round,
                    residual=0 if frozen is None else len(frozen),
                    blocks=1 if core is None else len(core),
                )
                sent = sum(t.numel() for n, t in tensors.items() if n.endswith("/" + module))
                if count is None:  # what is trained: beside a core, one scale per block where scales are trained
                    scales = len(held[f"core/{module}"]) if "scale" in brief.trains else 0
                    assert sent + scales == strategy.facts.trained(size), (name, brief.round, module)
                else:
                    assert sent == count.of(size), (name, brief.round, module, count.text)
        numbers = sum(t.numel() for t in load(brief.payload).values())
        assert 0 < len(brief.payload) - 4 * numbers <= 120 * (len(down) + 1)


def test_flora_na_costs_what_fedit_costs(tmp_path: Path) -> None:
    for name in ("fedit", "flora-na", "best-rank", "fedrot", "lora-fair"):
        run(tmp_path / name, name, 2)
    records = {n: read_records(tmp_path / n / "rounds.jsonl") for n in ("fedit", "flora-na", "best-rank", "fedrot")}
    assert len({tuple((r.bytes_up, r.bytes_down) for r in rounds) for rounds in records.values()}) == 1


@pytest.mark.parametrize("name", [*STRATEGIES, *VARIANTS])
def test_what_is_not_trained_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """A client cannot change what it was not asked to train: the server's copy counts."""
    strategy = built(name)
    state = strategy.init(first_adapter())
    for _ in range(3):
        payload = strategy.brief(state, "c0")
        fixed = {
            n: t for n, t in payload.adapter.tensors().items() if kind_of(n) not in {*payload.work.trains, "extra"}
        }
        parts = trained(strategy, state, 5)
        for part in parts:
            assert all(torch.equal(part.adapter.tensors()[n], t) for n, t in fixed.items())
        after = strategy.step(state, parts).state
        if name in ("ffa-lora", "rolora", "fed-sb", "ravan", "ravan one head"):
            assert all(torch.equal(after.adapter.tensors()[n], t) for n, t in fixed.items())
        state = after
