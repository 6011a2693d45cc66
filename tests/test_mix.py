"""FLoRA-NA's fit: never worse than FedIT, stationary, monotone, in all four readings and with both solvers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from florana.aggregate.flora_na import adamw, als, matrix_free
from florana.aggregate.flora_na.scalars import (
    Fit,
    Solver,
    as_blocks,
    as_factors,
    blocks_cost,
    directions_of,
    factors_cost,
    mix,
    per_model,
    per_model_relative,
    per_module,
)
from florana.lora.factors import Adapter, LoraFactors
from tests import oracle
from tests.cases import Case, cases, dense, make_case

SOLVERS = {"als": als.solve, "adamw": functools.partial(adamw.solve, steps=40)}
"""AdamW keeps its best iterate, so what these tests ask of it holds after any number of steps."""


def base_of(case: Case, kind: str) -> Adapter | None:
    """A last broadcast near the clients, or None for whole factors."""
    if kind == "factors":
        return None
    rng = np.random.default_rng(5)
    modules = {}
    for name, pair in case.parts[0].adapter.modules.items():
        noise = torch.from_numpy(rng.normal(size=tuple(pair.B.shape)) * 0.3).to(pair.B.dtype)
        modules[name] = LoraFactors(pair.B + noise, pair.A * 0.9, pair.scaling)
    return Adapter(modules, case.parts[0].adapter.extra)


def squares(adapter: Adapter, case: Case) -> dict[str, float]:
    return {n: float(np.sum((dense(adapter, n) - oracle.target(c)) ** 2)) for n, c in case.modules.items()}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("combine", ["factors", "updates"])
@given(case=cases())
def test_per_module_never_worse_than_fedit_on_any_module(solver: str, combine: str, case: Case) -> None:
    answer = mix(case.parts, solver=SOLVERS[solver], base=base_of(case, combine)).adapter
    for name, square in squares(answer, case).items():
        column = case.modules[name]
        fedit = float(np.sum((oracle.fedit(column) - oracle.target(column)) ** 2))
        assert square <= fedit * (1 + 1e-6) + 1e-12 * float(np.sum(oracle.target(column) ** 2))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("combine", ["factors", "updates"])
@given(case=cases(equal_scalings=True))
def test_per_model_never_worse_than_fedit_in_sum(solver: str, combine: str, case: Case) -> None:
    answer = mix(case.parts, solver=SOLVERS[solver], fit=per_model, base=base_of(case, combine)).adapter
    fedit = sum(float(np.sum((oracle.fedit(c) - oracle.target(c)) ** 2)) for c in case.modules.values())
    size = sum(float(np.sum(oracle.target(c) ** 2)) for c in case.modules.values())
    assert sum(squares(answer, case).values()) <= fedit * (1 + 1e-6) + 1e-12 * size


@pytest.mark.parametrize("combine", ["factors", "updates"])
@pytest.mark.parametrize("fit", [per_module, per_model], ids=["module", "model"])
def test_als_ends_where_the_dense_objective_is_flat(combine: str, fit: Fit) -> None:
    """The gradient of the oracle's dense error in (p, q), by central differences, vanishes at the answer."""
    case = make_case(11, 4, 2, [(7, 12), (9, 9)], drift=1.0, equal_scalings=True)
    base = base_of(case, combine)

    def tight(blocks: object) -> object:
        return als.solve(blocks, sweeps=2000, tolerance=1e-14)  # type: ignore[arg-type]

    found = mix(case.parts, solver=tight, fit=fit, base=base).coefficients  # type: ignore[arg-type]

    def objective(name: str, p: np.ndarray, q: np.ndarray) -> float:
        start = None if base is None else (base.modules[name].B.numpy(), base.modules[name].A.numpy())
        column = case.modules[name]
        return float(np.sum((oracle.mixed(column, p, q, start) - oracle.target(column)) ** 2))

    groups = [[name] for name in case.modules] if fit is per_module else [list(case.modules)]
    for group in groups:
        p, q = found[group[0]].p.numpy(), found[group[0]].q.numpy()
        size = sum(objective(name, p * 0, q * 0) for name in group)
        for index in range(2 * len(p)):
            step = np.zeros(2 * len(p))
            step[index] = 1e-4
            ends = [
                sum(objective(n, p + sign * step[: len(p)], q + sign * step[len(p) :]) for n in group)
                for sign in (1, -1)
            ]
            assert abs(ends[0] - ends[1]) / 2e-4 < 1e-4 * size


@pytest.mark.parametrize("combine", ["factors", "updates"])
@given(case=cases())
def test_als_error_never_increases_and_is_the_dense_error(combine: str, case: Case) -> None:
    mixture = mix(case.parts, solver=als.solve, base=base_of(case, combine))
    for name, found in mixture.coefficients.items():
        history = np.array(found.history)
        assert np.all(np.diff(history) <= 1e-12 * history[0] + 1e-300)
        scaling = mixture.adapter.modules[name].scaling
        truth = squares(mixture.adapter, case)[name] / scaling**2
        size = float(np.sum(oracle.target(case.modules[name]) ** 2)) / scaling**2
        assert abs(history[-1] - truth) <= 1e-6 * truth + 1e-12 * size


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_adapter_is_the_one_its_coefficients_say(solver: str) -> None:
    case = make_case(7, 5, 3, [(7, 12), (12, 7)], drift=1.0)
    mixture = mix(case.parts, solver=SOLVERS[solver])
    for name, found in mixture.coefficients.items():
        wanted = oracle.mixed(case.modules[name], found.p.numpy(), found.q.numpy(), None)
        assert np.allclose(dense(mixture.adapter, name), wanted, rtol=1e-9, atol=1e-12)


@given(case=cases(equal_scalings=True))
def test_identical_clients_keep_their_weights(case: Case) -> None:
    same = [dataclasses.replace(part, adapter=case.parts[0].adapter) for part in case.parts]
    weights = oracle.shares(next(iter(case.modules.values())))
    for found in mix(same, solver=als.solve).coefficients.values():
        assert np.allclose(found.p.numpy(), weights, atol=1e-8)
        assert np.allclose(found.q.numpy(), weights, atol=1e-8)


@given(case=cases())
def test_whole_factors_end_with_equal_norms_of_p_and_q(case: Case) -> None:
    for found in mix(case.parts, solver=als.solve).coefficients.values():
        assert float(found.p.norm()) == pytest.approx(float(found.q.norm()), rel=1e-9)


def test_differences_in_scale_along_shared_directions_are_repaired() -> None:
    """What 2U scalars can do: clients that differ only by the sizes of their factors reach the optimum."""
    rng = np.random.default_rng(0)
    case = make_case(0, 4, 3, [(20, 30)], drift=0.0, equal_scalings=True)
    sizes = rng.lognormal(sigma=1.0, size=(4, 2))
    column = [
        dataclasses.replace(c, B=c.B * sizes[u, 0], A=c.A * sizes[u, 1])
        for u, c in enumerate(case.modules["layer.0.q"])
    ]
    parts = [
        dataclasses.replace(
            part,
            adapter=Adapter(
                {"layer.0.q": LoraFactors(torch.from_numpy(c.B), torch.from_numpy(c.A), c.scaling)},
            ),
        )
        for part, c in zip(case.parts, column, strict=True)
    ]
    size = np.linalg.norm(oracle.target(column))
    assert np.linalg.norm(oracle.fedit(column) - oracle.target(column)) > 0.02 * size
    answer = mix(parts, solver=als.solve).adapter
    assert np.linalg.norm(dense(answer, "layer.0.q") - oracle.target(column)) < 1e-6 * size


@pytest.mark.parametrize("fit", [per_module, per_model], ids=["module", "model"])
@settings(max_examples=6)  # two hundred steps of AdamW each
@given(seed=st.integers(0, 1000))
def test_als_ends_no_higher_than_adamw(fit: Fit, seed: int) -> None:
    case = make_case(seed, 4, 2, [(7, 12), (12, 7)], drift=1.0)

    def total(solver: Solver) -> float:
        answer = mix(case.parts, solver=solver, fit=fit).coefficients
        return sum({id(c): c.history[-1] for c in answer.values()}.values())

    assert total(als.solve) <= total(adamw.solve) * (1 + 1e-3)


@given(case=cases(equal_scalings=True))
def test_relative_counting_never_ends_above_fedit_in_the_relative_sum(case: Case) -> None:
    answer = mix(case.parts, fit=per_model_relative).adapter
    sizes = {name: float(np.sum(oracle.target(c) ** 2)) for name, c in case.modules.items()}
    ours = sum(square / sizes[name] for name, square in squares(answer, case).items())
    fedit = sum(float(np.sum((oracle.fedit(c) - oracle.target(c)) ** 2)) / sizes[n] for n, c in case.modules.items())
    assert ours <= fedit * (1 + 1e-6) + 1e-11


def test_relative_and_absolute_counting_differ_where_modules_differ_in_size() -> None:
    case = make_case(2, 4, 2, [(7, 12), (12, 7)], drift=1.0, equal_scalings=True)
    grown = [
        dataclasses.replace(
            part,
            adapter=Adapter(
                {
                    n: LoraFactors(p.B * (100 if "0" in n else 1), p.A, p.scaling)
                    for n, p in part.adapter.modules.items()
                }
            ),
        )
        for part in case.parts
    ]
    small = {
        fit: (dense(mix(grown, fit=fit).adapter, "layer.1.q") - oracle.target(case.modules["layer.1.q"]))
        for fit in (per_model, per_model_relative)
    }
    assert np.linalg.norm(small[per_model_relative]) < np.linalg.norm(small[per_model])


@contextlib.contextmanager
def from_fedit_alone() -> Iterator[None]:
    """One start: which others the two ways try, and which of them has the lowest end after a sweep, may differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("florana.aggregate.flora_na.starts.NEAR", math.inf)
        yield


@pytest.mark.parametrize("combine", ["factors", "updates"])
@pytest.mark.parametrize("fit", [per_module, per_model], ids=["module", "model"])
@pytest.mark.parametrize("sweeps", [1, 4, 200])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_and_factors_lead_to_the_same_answer(combine: str, fit: Fit, sweeps: int, seed: int) -> None:
    """From FedIT, sweep by sweep to 1e-8; at the end, where the objective is flat, in the error they reach."""
    case = make_case(seed, 5, 3, [(40, 60), (50, 30)], drift=0.7)
    base = base_of(case, combine)
    solver = functools.partial(als.solve, sweeps=sweeps, tolerance=1e-14)
    with from_fedit_alone():
        one = mix(case.parts, solver=solver, fit=fit, base=base, way=as_blocks)
        two = mix(case.parts, solver=solver, fit=fit, base=base, way=as_factors)
    close = 1e-8 if sweeps < 10 else 1e-4
    for name, found in one.coefficients.items():
        assert torch.allclose(found.p, two.coefficients[name].p, atol=close)
        assert torch.allclose(found.q, two.coefficients[name].q, atol=close)
        first, second = dense(one.adapter, name), dense(two.adapter, name)
        assert np.linalg.norm(first - second) <= close * np.linalg.norm(first)
        falls = np.array(found.history) - found.history[0]
        assert two.coefficients[name].history[-1] == pytest.approx(falls[-1], rel=1e-9)


@pytest.mark.parametrize("combine", ["factors", "updates"])
@given(case=cases())
def test_the_first_half_steps_from_factors_and_from_blocks_are_the_same(combine: str, case: Case) -> None:
    """One sweep each from FedIT, conjugate gradients run to the end: p and q up to the pseudo-inverse's cut."""
    base = base_of(case, combine)
    solver = functools.partial(als.solve, sweeps=1, tolerance=1e-14)
    with from_fedit_alone():
        one = mix(case.parts, solver=solver, base=base, way=as_blocks)
        two = mix(case.parts, solver=solver, base=base, way=as_factors)
    for name in case.modules:
        size = np.linalg.norm(oracle.target(case.modules[name]))
        assert np.linalg.norm(dense(one.adapter, name) - dense(two.adapter, name)) <= 1e-6 * size


@pytest.mark.parametrize("fit", [per_module, per_model, per_model_relative], ids=["module", "model", "relative"])
@pytest.mark.parametrize("combine", ["factors", "updates"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(seed=st.integers(0, 1000))
def test_from_factors_never_worse_than_fedit_and_monotone(
    fit: Fit, combine: str, dtype: torch.dtype, seed: int
) -> None:
    case = make_case(seed, 6, 2, [(20, 30), (12, 16)], drift=1.0, equal_scalings=True, dtype=dtype)
    mixture = mix(case.parts, fit=fit, base=base_of(case, combine), way=as_factors)
    for found in mixture.coefficients.values():
        assert np.all(np.diff(found.history) <= 0)
    if fit is per_model_relative:
        return
    ours = squares(mixture.adapter, case)
    fedit = {n: float(np.sum((oracle.fedit(c) - oracle.target(c)) ** 2)) for n, c in case.modules.items()}
    for group in [[n] for n in ours] if fit is per_module else [list(ours)]:
        assert sum(ours[n] for n in group) <= sum(fedit[n] for n in group) * (1 + 1e-5)


@given(case=cases(equal_scalings=True))
def test_identical_clients_keep_their_weights_from_factors(case: Case) -> None:
    same = [dataclasses.replace(part, adapter=case.parts[0].adapter) for part in case.parts]
    weights = oracle.shares(next(iter(case.modules.values())))
    for found in mix(same, way=as_factors).coefficients.values():
        assert np.allclose(found.p.numpy(), weights, atol=1e-8)
        assert np.allclose(found.q.numpy(), weights, atol=1e-8)


def test_the_default_tolerance_from_factors_gives_up_little() -> None:
    """What the looser rule costs: at most half a percent of the error, where all inner products give the last digit."""
    case = make_case(8, 30, 4, [(80, 60)], drift=1.0)
    fast = squares(mix(case.parts, way=as_factors).adapter, case)["layer.0.q"]
    best = squares(mix(case.parts, way=as_blocks).adapter, case)["layer.0.q"]
    fedit = float(np.sum((oracle.fedit(case.modules["layer.0.q"]) - oracle.target(case.modules["layer.0.q"])) ** 2))
    assert fast <= best * 1.01
    assert fast - best <= 0.1 * (fedit - best)


def test_the_estimated_error_is_near_the_dense_one() -> None:
    case = make_case(8, 6, 3, [(80, 60)], drift=1.0)
    pairs = [part.adapter.modules["layer.0.q"] for part in case.parts]
    weights = torch.from_numpy(oracle.shares(case.modules["layer.0.q"]))
    for base in (None, pairs[0]):
        module = directions_of(pairs, base, weights)
        truth = oracle.target(case.modules["layer.0.q"]) / max(p.scaling for p in pairs)
        square = float(np.sum((truth - (module.B @ module.A).numpy()) ** 2))
        assert matrix_free.square_estimate(module, module.B, module.A) == pytest.approx(square, rel=0.3)


@pytest.mark.parametrize(
    ("clients", "size", "rank", "kind"),
    [(100, 4096, 16, "factors"), (10, 4096, 16, "factors"), (2, 4096, 16, "blocks"), (7, 384, 8, "blocks")],
)
def test_the_cost_model_prefers_the_way_that_was_measured_faster(clients: int, size: int, rank: int, kind: str) -> None:
    zero = torch.zeros(1)
    module = matrix_free.Directions(  # shapes without memory; blocks() would need it, so only its choice is looked at
        zero.expand(clients, size, rank), zero.expand(clients, rank, size), zero, zero, zero, zero, zero
    )
    assert (factors_cost({"q": module}) < blocks_cost({"q": module})) is (kind == "factors")


def test_modules_of_two_kinds_are_refused() -> None:
    case = make_case(0, 3, 2, [(7, 12)])
    pairs = [part.adapter.modules["layer.0.q"] for part in case.parts]
    module = directions_of(pairs, None, torch.full((3,), 1 / 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="one kind"):
        als.solve([module, module.blocks()])
