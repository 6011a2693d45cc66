"""Server optimizers against dense float64 recursions, over rounds, for every strategy that takes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from florana.errors import RecipeError
from florana.lora.factors import Adapter, Contribution
from florana.recipe.schema import Server
from florana.strategy import STRATEGIES, builder
from florana.strategy.base import State, Strategy
from florana.strategy.ranks import with_ranks
from tests import oracle
from tests.method_cases import RANKS, model_of, scaling_of, start_of, trained, truth_of

ETA, BETA = 0.7, 0.6
SUMMED = sorted(n for n, build in STRATEGIES.items() if build().facts.aims_at_sum)
ON_PRODUCTS = sorted(n for n, build in STRATEGIES.items() if "products" in build().facts.optimizer)
ON_FACTORS = sorted(n for n, build in STRATEGIES.items() if "factors" in build().facts.optimizer)


OPTIONS = {"ravan": {"heads": 2, "size": 2}}


def rule_of(name: str) -> Strategy:
    build = builder(name)
    assert build is not None
    return build(**OPTIONS.get(name, {}))


def around(name: str, **server: object) -> Strategy:
    return Server(**server).around(rule_of(name))  # type: ignore[arg-type]


def bare(state: State) -> State:
    """The state as the rule alone knows it."""
    memory = {name: tensor for name, tensor in state.memory.items() if not name.startswith("server/")}
    return dataclasses.replace(state, memory=memory)


def wide(adapter: Adapter) -> Adapter:
    modules = {n: dataclasses.replace(p, B=p.B.double(), A=p.A.double()) for n, p in adapter.modules.items()}
    return Adapter(modules, {n: t.double() for n, t in adapter.extra.items()})


def ahead(optimizer: str, d: np.ndarray, v: np.ndarray, length: float) -> tuple[np.ndarray, np.ndarray]:
    """(what is added to W_t, v_t), as the formulas are written."""
    if optimizer == "extrapolate":
        return ETA * length * d, v
    v = BETA * v + d
    return ETA * (v if optimizer == "momentum" else d + BETA * v), v


def fedexp(parts: Sequence[Contribution], state: State) -> float:
    """max(1, sum w ||d_u||^2 / 2 ||d||^2), dense, heads included."""
    total = sum(part.weight for part in parts)
    own, mean = 0.0, 0.0
    for module in state.adapter.modules:
        before = model_of(state.adapter, state.residual, module)
        for part in parts:
            own += part.weight / total * np.square(model_of(part.adapter, part.residual, module) - before).sum()
        mean += np.square(truth_of(parts, module) - before).sum()
    for name, last in state.adapter.extra.items():
        for part in parts:
            own += part.weight / total * float((part.adapter.extra[name] - last).square().sum())
        averaged = sum(part.weight / total * part.adapter.extra[name] for part in parts)
        mean += float((averaged - last).square().sum())
    return max(1.0, own / (2 * mean))


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "extrapolate"])
@pytest.mark.parametrize("name", SUMMED)
def test_the_rule_approximates_the_moved_target(name: str, optimizer: str) -> None:
    given = {"beta": BETA} if optimizer != "extrapolate" else {}
    strategy = around(name, optimizer=optimizer, learning_rate=ETA, velocity_rank=200 if given else None, **given)
    plain = rule_of(name)
    state = strategy.init(wide(start_of()))
    velocities = {module: np.zeros((1, 1)) for module in state.adapter.modules}
    for round_ in range(3):
        parts = trained(strategy, state, 10 + round_)
        length = fedexp(parts, state)
        outcome = strategy.step(state, parts)
        for module, pair in state.adapter.modules.items():
            before = model_of(state.adapter, state.residual, module)
            step, velocities[module] = ahead(optimizer, truth_of(parts, module) - before, velocities[module], length)
            wanted = before + step
            got = model_of(outcome.state.adapter, outcome.state.residual, module)
            if plain.facts.exact == "the optimum of rank r (Eckart-Young)" or name == "flexlora":
                wanted = oracle.best_rank(wanted, pair.rank)
            if name != "florist":  # to its threshold alone
                np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
        if optimizer == "extrapolate":
            assert outcome.notes["extrapolation"] == pytest.approx(length)
        else:
            assert outcome.notes["velocity_missed"] == pytest.approx(0.0, abs=1e-6)
        state = outcome.state


@pytest.mark.parametrize("name", [n for n in ON_PRODUCTS if n not in SUMMED])
def test_a_rule_that_answers_with_factors_is_moved_after_its_answer(name: str) -> None:
    strategy = around(name, optimizer="momentum", space="products", learning_rate=ETA, beta=BETA, velocity_rank=200)
    rule = rule_of(name)
    state = strategy.init(wide(start_of()))
    velocities = {module: np.zeros((1, 1)) for module in state.adapter.modules}
    for round_ in range(3):
        parts = trained(strategy, state, 20 + round_)
        inner = bare(state)
        answer = rule.step(inner, parts).state
        outcome = strategy.step(state, parts)
        for module, pair in state.adapter.modules.items():
            before = model_of(state.adapter, None, module)
            moved = model_of(answer.adapter, None, module) - before
            velocities[module] = BETA * velocities[module] + moved
            wanted = oracle.best_rank(before + ETA * velocities[module], pair.rank)
            got = model_of(outcome.state.adapter, None, module)
            np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
        state = outcome.state


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adam"])
@pytest.mark.parametrize("name", ON_FACTORS)
def test_on_factors_each_averaged_tensor_follows_the_textbook(name: str, optimizer: str) -> None:
    more = {"beta2": 0.9, "epsilon": 0.01} if optimizer == "adam" else {}
    strategy = around(name, optimizer=optimizer, space="factors", learning_rate=ETA, beta=BETA, **more)
    rule = rule_of(name)
    state = strategy.init(wide(start_of()))
    first: dict[str, np.ndarray] = {}
    second: dict[str, np.ndarray] = {}
    times: dict[str, int] = {}
    for round_ in range(4):
        parts = trained(strategy, state, 30 + round_)
        work = rule.brief(state, "c0").work.up | {"extra"}
        answer = rule.step(bare(state), parts).state
        outcome = strategy.step(state, parts)
        last, mean, got = (s.adapter.tensors() for s in (state, answer, outcome.state))
        for key in mean:
            x = last[key].numpy()
            if key.partition("/")[0] not in work:
                np.testing.assert_array_equal(got[key].numpy(), x)
                continue
            d = mean[key].numpy() - x
            if optimizer == "adam":
                t = times[key] = times.get(key, 0) + 1
                first[key] = BETA * first.get(key, 0 * d) + (1 - BETA) * d
                second[key] = 0.9 * second.get(key, 0 * d) + 0.1 * d * d
                unbiased, root = first[key] / (1 - BETA**t), np.sqrt(second[key] / (1 - 0.9**t))
                wanted = x + ETA * unbiased / (root + 0.01)
            else:
                first[key] = BETA * first.get(key, 0 * d) + d
                wanted = x + ETA * (first[key] if optimizer == "momentum" else d + BETA * first[key])
            np.testing.assert_allclose(got[key].numpy(), wanted, rtol=1e-6, atol=1e-9)
        state = outcome.state


@pytest.mark.parametrize("name", ON_PRODUCTS)
def test_without_velocity_and_at_rate_one_nothing_moves_but_the_factors(name: str) -> None:
    plain = rule_of(name)
    moved = around(name, optimizer="momentum", space="products", beta=0.0)
    state = plain.init(wide(start_of()))
    parts = trained(plain, state, 3)
    before, after = plain.step(state, parts).state, moved.step(state, parts).state
    for module in before.adapter.modules:
        one, other = (model_of(s.adapter, s.residual, module) for s in (before, after))
        np.testing.assert_allclose(other, one, atol=1e-6 * np.abs(one).max())
    assert all(torch.allclose(after.adapter.extra[n], t) for n, t in before.adapter.extra.items())


def test_a_velocity_of_few_components_says_what_it_leaves_out() -> None:
    strategy = around("best-rank", optimizer="momentum", velocity_rank=4)
    state = strategy.init(wide(start_of()))
    outcome = strategy.step(state, trained(strategy, state, 1))
    d = {m: truth_of(trained(strategy, state, 1), m) - model_of(state.adapter, None, m) for m in state.adapter.modules}
    values = [np.linalg.svd(matrix, compute_uv=False) for matrix in d.values()]
    missed = np.sqrt(sum((v[4:] ** 2).sum() for v in values) / sum((v**2).sum() for v in values))
    assert outcome.notes["velocity_missed"] == pytest.approx(missed, rel=1e-6)
    assert all(t.shape[0 if n.startswith("server/A") else 1] == 4 for n, t in outcome.state.memory.items()
               if n.startswith(("server/A/", "server/B/")))  # fmt: skip


@pytest.mark.parametrize("name", ["best-rank", "flora-na", "hetlora", "oracle"])
def test_heterogeneous_ranks_and_absent_clients(name: str) -> None:
    strategy = with_ranks(around(name, optimizer="momentum", space="products"), RANKS, scaling_of)
    state = strategy.init(start_of())
    for round_ in range(3):
        parts = trained(strategy, state, round_)
        state = strategy.step(state, parts[round_:]).state
    assert all(pair.rank == 4 and bool(pair.A.isfinite().all()) for pair in state.adapter.modules.values())


@pytest.mark.parametrize("factorization", ["balanced", "orthonormal", "aligned"])
@pytest.mark.parametrize("name", ["fedit", "flora-na", "best-rank", "fedex-lora", "lora-fair", "hetlora", "oracle"])
def test_a_factorization_keeps_the_product(name: str, factorization: str) -> None:
    plain, turned = builder(name)(), around(name, factorization=factorization)  # type: ignore[misc]
    state = plain.init(wide(start_of()))
    parts = trained(plain, state, 5)
    before, after = plain.step(state, parts).state, turned.step(state, parts).state
    for module, pair in after.adapter.modules.items():
        one, other = (model_of(s.adapter, s.residual, module) for s in (before, after))
        np.testing.assert_allclose(other, one, atol=1e-9 * np.abs(one).max())
        if factorization == "orthonormal":
            torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(pair.rank, dtype=torch.float64))
        else:
            assert float(pair.B.norm()) == pytest.approx(float(pair.A.norm()))


@pytest.mark.parametrize(
    ("name", "server", "part"),
    [
        ("fedsa-lora", {"optimizer": "momentum"}, "no global product"),
        ("fedsvd", {"optimizer": "momentum"}, "needs? the factors|need the factors"),
        ("ffa-lora", {"optimizer": "momentum", "space": "products"}, "it goes with factors"),
        ("best-rank", {"optimizer": "adam"}, "entry"),
        ("ffa-lora", {"factorization": "balanced"}, "need the factors"),
        ("fedit", {"optimizer": "momentum", "factorization": "balanced"}, "moments belong"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, server: dict[str, object], part: str) -> None:
    with pytest.raises(RecipeError, match=part) as caught:
        around(name, **server)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("server", "part"),
    [
        ({"beta": 0.5}, "server.beta has no meaning"),
        ({"optimizer": "extrapolate", "velocity_rank": 8}, "velocity_rank has no meaning"),
        ({"optimizer": "momentum", "beta": 1.0}, "less than 1"),
        ({"optimizer": "momentum", "learning_rate": 0}, "greater than 0"),
    ],
)
def test_settings_without_meaning_are_refused(server: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Server(**server)  # type: ignore[arg-type]
