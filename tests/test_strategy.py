"""Strategies over rounds: pure steps, and the oracle's model is the exact average round after round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy import STRATEGIES
from florana.strategy.base import State
from tests import oracle
from tests.cases import dense, make_case


@pytest.mark.parametrize(
    "options",
    [
        {"combine": c, "scope": s, "solver": v}
        for c in ("factors", "updates")
        for s in ("module", "model", "model-relative")
        for v in ("als", "adamw")
    ]
    + [{"combine": c, "scope": "component"} for c in ("factors", "updates")],
    ids=str,
)
def test_every_reading_of_flora_na_runs_and_says_its_coefficients(options: dict[str, str]) -> None:
    case = make_case(1, 3, 2, [(7, 12), (12, 7)], dtype=torch.float32)
    strategy = STRATEGIES["flora-na"](**options)
    outcome = strategy.step(strategy.init(case.parts[0].adapter), case.parts)
    assert len(outcome.notes["p"]) == len(outcome.notes["q"]) == 3  # type: ignore[arg-type]
    assert outcome.notes["clients"] == ["c0", "c1", "c2"]


def test_the_readings_of_flora_na_differ() -> None:
    """Were an option ignored, two readings would give the same adapter."""
    case = make_case(2, 4, 2, [(7, 12), (12, 7)], drift=1.0)
    answers = []
    for combine in ("factors", "updates"):
        for scope in ("module", "model"):
            strategy = STRATEGIES["flora-na"](combine=combine, scope=scope)
            # A base outside the clients' span: inside it, factors and updates mix the same set.
            start = make_case(9, 1, 2, [(7, 12), (12, 7)]).parts[0].adapter
            answers.append(dense(strategy.step(strategy.init(start), case.parts).state.adapter, "layer.0.q"))
    for i in range(4):
        for j in range(i):
            assert np.linalg.norm(answers[i] - answers[j]) > 1e-4 * np.linalg.norm(answers[i])


def test_the_oracle_is_the_exact_average_over_rounds() -> None:
    """Clients train on the pair they are sent; the server's model must be the mean of theirs, residual included."""
    rng = np.random.default_rng(0)
    strategy = STRATEGIES["oracle"]()
    state: State = strategy.init(make_case(3, 1, 2, [(9, 13), (14, 6)]).parts[0].adapter)
    weights = [0.2, 0.5, 0.3]
    for _ in range(4):
        payload = strategy.brief(state, "any")
        models: dict[str, list[np.ndarray]] = {name: [] for name in payload.adapter.modules}
        parts = []
        for u, weight in enumerate(weights):
            modules = {}
            for name, pair in payload.adapter.modules.items():
                B = pair.B + torch.from_numpy(rng.normal(size=tuple(pair.B.shape)))
                A = pair.A + torch.from_numpy(rng.normal(size=tuple(pair.A.shape)))
                modules[name] = LoraFactors(B, A, pair.scaling)
                frozen = dense(payload.residual, name) if payload.residual is not None else 0.0
                models[name].append(pair.scaling * (B @ A).numpy() + frozen)
            parts.append(Contribution(f"c{u}", Adapter(modules, payload.adapter.extra), weight, payload.residual))
        state = strategy.step(state, parts).state
        assert state.residual is not None
        for name, own in models.items():
            truth = sum(w * model for w, model in zip(weights, own, strict=True))
            server = dense(state.adapter, name) + dense(state.residual, name)
            assert np.linalg.norm(server - truth) <= 1e-6 * np.linalg.norm(truth)
            pair = state.adapter.modules[name]
            optimum = np.linalg.norm(truth - oracle.best_rank(truth, pair.rank))
            assert np.linalg.norm(truth - dense(state.adapter, name)) == pytest.approx(optimum, rel=1e-6)
            assert state.residual.modules[name].rank <= min(truth.shape)
