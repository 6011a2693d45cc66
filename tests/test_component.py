"""FLoRA-NA with a coefficient per client and rank component: between scalars and the best rank, by dense oracles."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from florana import read_adapter
from florana.adapters.merge import merge
from florana.aggregate.error import measure
from florana.aggregate.flora_na import als, component
from florana.aggregate.flora_na.scalars import as_blocks, as_factors, mix, per_model
from florana.errors import InputError, RecipeError
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.recipe.load import check
from florana.strategy import STRATEGIES
from tests import oracle
from tests.cases import Case, cases, dense, make_case
from tests.test_mix import base_of, squares

COMBINE = pytest.mark.parametrize("combine", ["factors", "updates"])
to_the_end = functools.partial(component.solve, sweeps=3000, tolerance=1e-13)


def start_of(base: Adapter | None, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    return None if base is None else (base.modules[name].B.numpy(), base.modules[name].A.numpy())


@COMBINE
@given(case=cases())
def test_between_the_scalars_and_the_best_rank(combine: str, case: Case) -> None:
    base = base_of(case, combine)
    ours = squares(mix(case.parts, solver=component.solve, base=base).adapter, case)
    scalars = squares(mix(case.parts, solver=als.solve, base=base).adapter, case)
    for name, column in case.modules.items():
        target = oracle.target(column)
        slack = 1e-12 * float(np.sum(target**2))
        best = float(np.sum((oracle.best_rank(target, column[0].B.shape[1]) - target) ** 2))
        fedit = float(np.sum((oracle.fedit(column) - target) ** 2))
        assert best - slack <= ours[name] <= scalars[name] * (1 + 1e-9) + slack
        assert ours[name] <= fedit * (1 + 1e-9) + slack


@COMBINE
@given(case=cases())
def test_the_adapter_is_its_coefficients_and_the_history_its_error(combine: str, case: Case) -> None:
    base = base_of(case, combine)
    mixture = mix(case.parts, solver=component.solve, base=base)
    for name, found in mixture.coefficients.items():
        column = case.modules[name]
        assert found.p.shape == found.q.shape == (len(column), column[0].B.shape[1])
        start = start_of(base, name)
        if start is not None:  # the base enters at the output's scaling
            start = (start[0] * base.modules[name].scaling / max(c.scaling for c in column), start[1])  # type: ignore[union-attr]
        wanted = oracle.mixed_by_component(column, found.p.numpy(), found.q.numpy(), start)
        size = float(np.sum(oracle.target(column) ** 2))
        assert np.sum((dense(mixture.adapter, name) - wanted) ** 2) <= 1e-16 * size
        history = np.array(found.history)
        assert np.all(np.diff(history) <= 0)
        scaling = mixture.adapter.modules[name].scaling
        truth = squares(mixture.adapter, case)[name]
        assert abs(history[-1] * scaling**2 - truth) <= 1e-6 * truth + 1e-12 * size


@COMBINE
@pytest.mark.parametrize("seed", range(3))
def test_one_sweep_is_two_dense_least_squares(combine: str, seed: int) -> None:
    """p for the scalars' q, then q for that p: the error of the oracle's two solves."""
    case = make_case(seed, 3, 2, [(7, 12), (12, 7)], drift=1.0, equal_scalings=True)
    base = base_of(case, combine)
    once = mix(case.parts, solver=functools.partial(component.solve, sweeps=1), base=base)
    scalars = mix(case.parts, solver=als.solve, base=base).coefficients
    for name, column in case.modules.items():
        q = np.repeat(scalars[name].q.numpy()[:, None], 2, axis=1)
        p = oracle.best_by_component(column, q, "p", start_of(base, name))
        q = oracle.best_by_component(column, p, "q", start_of(base, name))
        wanted = oracle.mixed_by_component(column, p, q, start_of(base, name))
        square = float(np.sum((wanted - oracle.target(column)) ** 2))
        assert squares(once.adapter, case)[name] == pytest.approx(square, rel=1e-6)


@COMBINE
def test_at_the_end_no_dense_half_step_lowers_the_error(combine: str) -> None:
    case = make_case(5, 4, 2, [(7, 12), (9, 9)], drift=1.0, equal_scalings=True)
    base = base_of(case, combine)
    mixture = mix(case.parts, solver=to_the_end, base=base)
    for name, column in case.modules.items():
        found, start = mixture.coefficients[name], start_of(base, name)
        p, q, target = found.p.numpy(), found.q.numpy(), oracle.target(column)
        now = float(np.sum((oracle.mixed_by_component(column, p, q, start) - target) ** 2))
        for pair in (
            (oracle.best_by_component(column, q, "p", start), q),
            (p, oracle.best_by_component(column, p, "q", start)),
        ):
            then = float(np.sum((oracle.mixed_by_component(column, *pair, start) - target) ** 2))
            assert now * (1 - 1e-5) <= then <= now * (1 + 1e-9)


@given(case=cases(equal_scalings=True))
def test_identical_clients_keep_their_weights(case: Case) -> None:
    same = [dataclasses.replace(part, adapter=case.parts[0].adapter) for part in case.parts]
    weights = oracle.shares(next(iter(case.modules.values())))[:, None]
    for found in mix(same, solver=component.solve).coefficients.values():
        assert np.allclose(found.p.numpy(), weights, atol=1e-8)
        assert np.allclose(found.q.numpy(), weights, atol=1e-8)


@given(case=cases())
def test_every_component_ends_with_equal_norms(case: Case) -> None:
    for found in mix(case.parts, solver=component.solve).coefficients.values():
        assert torch.allclose(found.p.norm(dim=0), found.q.norm(dim=0), rtol=1e-9)


def scaled_columns(seed: int, signs: bool = False) -> Case:
    """Clients that share every direction and differ by the size (and sign) of each component, product by product."""
    rng = np.random.default_rng(seed)
    case = make_case(seed, 2, 8, [(20, 30)], drift=0.0, equal_scalings=True)
    parts, column = [], []
    for part, client in zip(case.parts, case.modules["layer.0.q"], strict=True):
        left, right = rng.lognormal(size=8), rng.lognormal(size=8)
        flips = rng.choice([-1.0, 1.0], size=8) if signs else np.ones(8)
        client = dataclasses.replace(client, B=client.B * left * flips, A=client.A * (right * flips)[:, None])
        column.append(client)
        pair = LoraFactors(torch.from_numpy(client.B), torch.from_numpy(client.A), client.scaling)
        parts.append(dataclasses.replace(part, adapter=Adapter({"layer.0.q": pair})))
    return Case(parts, {"layer.0.q": column}, 8)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_sizes_and_signs_of_single_components_are_repaired(seed: int, signs: bool) -> None:
    """The target has rank r, and a coefficient per component reaches it; scalars do not."""
    case = scaled_columns(seed, signs)
    size = float(np.sum(oracle.target(case.modules["layer.0.q"]) ** 2))
    scalars = squares(mix(case.parts).adapter, case)["layer.0.q"]
    ours = squares(mix(case.parts, solver=component.solve).adapter, case)["layer.0.q"]
    assert ours <= 1e-10 * size < 1e-5 * size < scalars


def test_the_way_to_the_solver_does_not_matter() -> None:
    case = make_case(3, 5, 3, [(40, 60), (50, 30)], drift=0.7)
    one, two = (mix(case.parts, solver=component.solve, way=way).adapter for way in (as_blocks, as_factors))
    for name in case.modules:
        assert np.allclose(dense(one, name), dense(two, name), rtol=1e-9, atol=1e-12)


def test_modules_can_share_coefficients_where_their_ranks_are_equal() -> None:
    case = make_case(4, 4, 2, [(7, 12), (12, 7)], drift=1.0, equal_scalings=True)
    shared = mix(case.parts, solver=component.solve, fit=per_model)
    assert len({id(found) for found in shared.coefficients.values()}) == 1
    ours, fedit = squares(shared.adapter, case), squares(mix(case.parts, fit=per_model).adapter, case)
    assert sum(ours.values()) <= sum(fedit.values()) * (1 + 1e-9)
    two, three = (make_case(0, 3, rank, [(7, 12)]).parts[0].adapter.modules["layer.0.q"] for rank in (2, 3))
    parts = [Contribution(f"c{u}", Adapter({"a": two, "b": three}), 1.0) for u in range(2)]
    with pytest.raises(InputError, match="heterogeneous ranks"):
        mix(parts, solver=component.solve, fit=per_model)


def test_more_unknowns_than_it_takes_on_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component, "MOST", 11)
    case = make_case(0, 4, 3, [(7, 12)])
    with pytest.raises(InputError, match=r"4 clients of rank 3 are 12 unknowns") as caught:
        mix(case.parts, solver=component.solve)
    assert "scope = 'module'" in str(caught.value)
    assert mix(case.parts[:3], solver=component.solve).adapter.modules


def test_many_clients_of_some_rank() -> None:
    """Two hundred and forty unknowns, far more than a module's sides: still between the scalars and the best rank."""
    case = make_case(9, 60, 4, [(16, 24)], drift=1.0, dtype=torch.float32)
    column = case.modules["layer.0.q"]
    ours = squares(mix(case.parts, solver=component.solve).adapter, case)["layer.0.q"]
    target = oracle.target(column)
    best = float(np.sum((oracle.best_rank(target, 4) - target) ** 2))
    assert best * (1 - 1e-5) <= ours <= 1.02 * best


@pytest.mark.shared
def test_the_real_client_adapters_go_two_thirds_of_the_way(shared: Path) -> None:
    """FedIT 0.442, scalars 0.404, one sweep 0.28, to the end 0.212, the best rank 0.103."""
    folder = shared / "client_adapters" / "minilm-agnews-r8"
    weights = json.loads((folder / "weights.json").read_text())["weights"]
    parts = [Contribution(f"c{u}", read_adapter(folder / f"client-{u}")[0], weight) for u, weight in enumerate(weights)]
    once = functools.partial(component.solve, sweeps=1)
    figures = [measure(parts, mix(parts, solver=solver).adapter) for solver in (als.solve, once, component.solve)]
    assert [round(figure.error, 3) for figure in figures] == [0.404, 0.282, 0.212]
    assert round(figures[0].optimum, 3) == 0.103


@pytest.mark.shared
def test_merge_takes_the_scope_and_refuses_what_is_not_defined(shared: Path, tmp_path: Path) -> None:
    root = shared / "client_adapters" / "minilm-agnews-r8"
    folders = sorted(root.glob("client-*"))
    weights = json.loads((root / "weights.json").read_text())["weights"]
    done = merge(folders, tmp_path / "out", method="flora-na", scope="component", weights=weights)
    assert (round(done.error, 3), done.rank, done.method) == (0.212, 8, "flora-na[scope=component]")
    assert merge(folders, tmp_path / "plain", method="flora-na", scope="module", weights=weights).error > 0.4
    for scope, method, why in (
        ("component", "fedit", "--scope has no meaning for 'fedit'"),
        ("model", "flora-na", "no coefficient is shared"),
        ("model-relative", "flora-na", "module, component"),
        ("", "flora-na", "there is no scope ''"),
    ):
        with pytest.raises(RecipeError, match=why):
            merge(folders, tmp_path / "no", method=method, scope=scope)
    assert not (tmp_path / "no").exists()


@COMBINE
def test_the_strategy_has_the_scope_with_its_notes(combine: str) -> None:
    case = make_case(1, 3, 2, [(7, 12), (12, 7)], drift=1.0)
    strategy = STRATEGIES["flora-na"](scope="component", combine=combine)
    begun = strategy.init(make_case(9, 1, 2, [(7, 12), (12, 7)]).parts[0].adapter)
    outcome = strategy.step(begun, case.parts)
    wanted = mix(case.parts, solver=component.solve, base=begun.adapter if combine == "updates" else None)
    for name in case.modules:
        assert np.allclose(dense(outcome.state.adapter, name), dense(wanted.adapter, name))
    assert len(outcome.notes["p"]) == len(outcome.notes["q"]) == 3  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"solver = 'adamw' does not go with strategy\.scope = 'component'"):
        STRATEGIES["flora-na"](scope="component", combine=combine, solver="adamw")


def test_mixed_ranks_are_padded_as_in_the_other_scopes() -> None:
    """What a lower rank lacks stays zero; the fit is of the padded factors, and no worse than the scalars'."""
    case = make_case(4, 4, 2, [(9, 12)], drift=1.0, mixed_ranks=True, equal_scalings=True)
    start = make_case(9, 1, 4, [(9, 12)]).parts[0].adapter
    errors = {}
    for scope in ("module", "component"):
        strategy = STRATEGIES["flora-na"](scope=scope)
        errors[scope] = squares(strategy.step(strategy.init(start), case.parts).state.adapter, case)["layer.0.q"]
    assert errors["component"] < 0.9 * errors["module"]


def test_too_many_clients_are_refused_when_the_recipe_is_read(recipe_table: dict[str, object]) -> None:
    recipe_table["strategy"] = {"name": "flora-na", "scope": "component"}
    recipe_table["model"] |= {"rank": 8}  # type: ignore[operator]
    recipe_table["partition"] |= {"clients": 600}  # type: ignore[operator]
    recipe_table["federation"] = {"rounds": 1}
    with pytest.raises(RecipeError, match="600 clients of rank 8 are 4800"):
        check(recipe_table, "test")
    recipe_table["federation"] = {"rounds": 1, "clients_per_round": 10}
    assert check(recipe_table, "test")
