"""The contract table: every rule x every invariant, against the dense oracle, on generated non-square modules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from florana.aggregate.best_rank.project import best_rank, by_power
from florana.aggregate.best_rank.truncate import by_energy, divided, everything
from florana.aggregate.cores import folded, mean_cores
from florana.aggregate.factorization import orthonormal
from florana.aggregate.fair import corrected_mean
from florana.aggregate.flora_na import adamw, als, component
from florana.aggregate.flora_na.scalars import mix, per_model
from florana.aggregate.heterogeneous import norm_weighted_mean
from florana.aggregate.mean import mean
from florana.aggregate.remainder import mean_and_remainder
from florana.aggregate.rotate import align, by_A, by_B, rotated_mean
from florana.aggregate.shared_factor import mean_of_A, mean_of_B
from florana.aggregate.stack import combined, stack
from florana.errors import InputError
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.strategy import STRATEGIES
from florana.strategy.base import State
from florana.strategy.two_trips import seen
from tests import oracle
from tests.cases import Case, cases, dense, make_case


def rank_of(parts: Sequence[Contribution]) -> int:
    return max(pair.rank for part in parts for pair in part.adapter.modules.values())


def exact_split(parts: Sequence[Contribution]) -> Adapter:
    whole = divided(parts, rank_of(parts), everything)
    return combined(whole.adapter, whole.residual)


def exact_mean(parts: Sequence[Contribution]) -> Adapter:
    whole = mean_and_remainder(parts)
    return combined(whole.adapter, whole.remainder)


def whole_energy(parts: Sequence[Contribution]) -> Adapter:
    whole = divided(parts, rank_of(parts), by_energy(1.0))
    return combined(whole.adapter, whole.residual)


def zero_base(parts: Sequence[Contribution]) -> Adapter:
    """A last broadcast that is half of the first client's adapter."""
    modules = {n: LoraFactors(p.B / 2, p.A / 2, p.scaling) for n, p in parts[0].adapter.modules.items()}
    return Adapter(modules, parts[0].adapter.extra)


def as_they_are(case: Case) -> Case:
    """Clients that share nothing."""
    return case


def with_one_A(case: Case) -> Case:  # noqa: N802
    """The same clients, all with the first one's A."""
    return _shared(case, "A")


def with_one_B(case: Case) -> Case:  # noqa: N802
    """The same clients, all with the first one's B."""
    return _shared(case, "B")


def _shared(case: Case, letter: str) -> Case:
    modules = {
        name: [dataclasses.replace(client, **{letter: getattr(column[0], letter)}) for client in column]
        for name, column in case.modules.items()
    }
    return Case(_parts(case, modules), modules, case.rank)


def with_cores(case: Case) -> Case:
    """Clients that share the first one's factors and scaling, each with its own core between them."""
    rng = np.random.default_rng(len(case.parts))
    cores = [{n: rng.normal(size=(1, case.rank, case.rank)) for n in case.modules} for _ in case.parts]
    modules = {
        name: [
            dataclasses.replace(column[0], B=column[0].B @ own[name][0], weight=client.weight)
            for client, own in zip(column, cores, strict=True)
        ]
        for name, column in case.modules.items()
    }
    dtype = case.parts[0].adapter.modules["layer.0.q"].A.dtype
    first = case.parts[0].adapter
    parts = [
        dataclasses.replace(
            part,
            adapter=Adapter(
                {n: LoraFactors(p.B.clone(), p.A.clone(), p.scaling) for n, p in first.modules.items()},
                part.adapter.extra,
                {n: torch.from_numpy(core).to(dtype) for n, core in own.items()},
            ),
        )
        for part, own in zip(case.parts, cores, strict=True)
    ]
    return Case(parts, modules, case.rank)


def with_some_blocks(case: Case) -> Case:
    """Clients with one block per rank between the first one's factors, each training some of them, the rest as sent."""
    rng = np.random.default_rng(len(case.parts))
    sent = {name: rng.normal(size=(case.rank, 1, 1)) for name in case.modules}
    same = with_cores(case)
    parts, columns = [], {name: [] for name in case.modules}  # type: ignore[var-annotated]
    for part in same.parts:
        blocks = [k for k in range(case.rank) if rng.random() < 0.5] or [0]
        cores = {}
        for name, core in sent.items():
            own = core.copy()
            own[blocks] += rng.normal(size=(len(blocks), 1, 1))
            cores[name] = torch.from_numpy(own).to(part.adapter.modules[name].A.dtype)
            first = case.modules[name][0]
            column = dataclasses.replace(first, B=first.B * own[:, 0, 0], weight=part.weight)
            columns[name].append(column)
        whole = Adapter(part.adapter.modules, part.adapter.extra, cores)
        parts.append(dataclasses.replace(part, adapter=whole, blocks=tuple(blocks)))
    return Case(parts, columns, case.rank)


def _parts(case: Case, modules: dict[str, list[oracle.Client]]) -> list[Contribution]:
    dtype = case.parts[0].adapter.modules["layer.0.q"].A.dtype
    return [
        dataclasses.replace(
            part,
            adapter=Adapter(
                {
                    n: LoraFactors(
                        torch.from_numpy(column[u].B).to(dtype),
                        torch.from_numpy(column[u].A).to(dtype),
                        column[u].scaling,
                    )
                    for n, column in modules.items()
                },
                part.adapter.extra,
            ),
        )
        for u, part in enumerate(case.parts)
    ]


def copy_of(part: Contribution) -> Adapter:
    """A server's own copy of what the first client holds."""
    modules = {n: LoraFactors(p.B.clone(), p.A.clone(), p.scaling) for n, p in part.adapter.modules.items()}
    return Adapter(modules, part.adapter.extra)


def from_sums(parts: Sequence[Contribution]) -> Adapter:
    """best-rank[source=sums] on clients that were sent one A, which is nobody's."""
    modules = {}
    for name, pair in parts[0].adapter.modules.items():
        drawn = torch.randn(rank_of(parts), pair.shape[1], generator=torch.Generator().manual_seed(7))
        A = drawn.to(pair.A.dtype)
        modules[name] = LoraFactors(torch.zeros(pair.shape[0], len(A), dtype=A.dtype), A, pair.scaling)
    strategy, state = STRATEGIES["best-rank"](source="sums"), State(0, Adapter(modules, parts[0].adapter.extra))
    return strategy.step(state, seen(strategy, state, parts)).state.adapter


few_steps = functools.partial(adamw.solve, steps=25)  # the invariants hold at every number of steps

Rule = Callable[[Sequence[Contribution]], Adapter]


@dataclasses.dataclass(frozen=True)
class Row:
    """What a rule promises."""

    name: str
    rule: Rule
    exact: bool = False
    mixed_ranks: bool = False
    keeps_rank: bool = True
    weight_two: bool = True  # one client of weight 2 = two clients of weight 1
    gauge_free: bool = False  # (B G, G^-1 A) changes nothing
    prepare: Callable[[Case], Case] = as_they_are  # what the clients must have in common


ROWS = [
    Row("mean", mean),
    Row("stack", stack, exact=True, mixed_ranks=True, keeps_rank=False, gauge_free=True),
    Row("best-rank", lambda p: best_rank(p, rank_of(p)), mixed_ranks=True, gauge_free=True),
    Row(
        "best-rank power",
        lambda p: best_rank(p, rank_of(p), tolerance=1e-12, way=by_power),
        mixed_ranks=True,
        gauge_free=True,
    ),
    Row("best-rank from sums", from_sums, mixed_ranks=True, gauge_free=True),
    Row("oracle", exact_split, exact=True, mixed_ranks=True, keeps_rank=False, gauge_free=True),
    Row("fedex-lora", exact_mean, exact=True, keeps_rank=False, gauge_free=True),
    Row("lora-fair", corrected_mean),
    Row("fedrot updates", lambda p: rotated_mean(p, zero_base(p))),
    Row("fedrot updates by A", lambda p: rotated_mean(p, zero_base(p), by_A(0.5))),
    Row("fedrot updates by B", lambda p: rotated_mean(p, zero_base(p), by_B(0.5))),
    Row("flexlora", lambda p: orthonormal(best_rank(p, rank_of(p)), p[0].adapter), mixed_ranks=True, gauge_free=True),
    Row("hetlora", lambda p: norm_weighted_mean(p, rank_of(p)), mixed_ranks=True),
    Row("ffa-lora", lambda p: mean_of_B(p, copy_of(p[0])), exact=True, prepare=with_one_A),
    Row("rolora even", lambda p: mean_of_A(p, copy_of(p[0])), exact=True, prepare=with_one_B),
    Row(
        "fedsvd",
        lambda p: orthonormal(mean_of_B(p, copy_of(p[0])), copy_of(p[0])),
        exact=True,
        prepare=with_one_A,
    ),
    Row("florist", whole_energy, exact=True, mixed_ranks=True, keeps_rank=False, gauge_free=True),
    Row("fed-sb", lambda p: folded(mean_cores(p)), exact=True, prepare=with_cores),
    Row("ravan, some heads", lambda p: folded(mean_cores(p)), prepare=with_some_blocks),
    Row("flora-na factors/module", lambda p: mix(p, solver=als.solve).adapter),
    Row("flora-na factors/model", lambda p: mix(p, solver=als.solve, fit=per_model).adapter),
    Row("flora-na updates/module", lambda p: mix(p, solver=als.solve, base=zero_base(p)).adapter),
    Row("flora-na updates/model", lambda p: mix(p, solver=als.solve, fit=per_model, base=zero_base(p)).adapter),
    Row("flora-na factors/component", lambda p: mix(p, solver=component.solve).adapter),
    Row("flora-na updates/component", lambda p: mix(p, solver=component.solve, base=zero_base(p)).adapter),
    Row("flora-na adamw", lambda p: mix(p, solver=few_steps).adapter, weight_two=False),
]
every = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def close(a: np.ndarray, b: np.ndarray, scale: np.ndarray | None = None, tolerance: float = 1e-9) -> bool:
    size = np.linalg.norm(b if scale is None else scale)
    return bool(np.linalg.norm(a - b) <= tolerance * max(size, 1e-300))


def error(adapter: Adapter, case: Case, module: str) -> float:
    return float(np.linalg.norm(dense(adapter, module) - oracle.target(case.modules[module])))


@every
@given(case=cases())
def test_one_client_comes_out_as_it_went_in(row: Row, case: Case) -> None:
    case = row.prepare(case)
    alone = row.rule(case.parts[:1])
    for name, column in case.modules.items():
        only = column[0].scaling * column[0].B @ column[0].A
        assert close(dense(alone, name), only, tolerance=1e-8)


@every
@given(case=cases(), order=st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(row: Row, case: Case, order: object) -> None:
    case = row.prepare(case)
    shuffled = list(case.parts)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    if "updates" in row.name:  # the base is made from the first client: keep it first
        shuffled.remove(case.parts[0])
        shuffled.insert(0, case.parts[0])
    first, second = row.rule(case.parts), row.rule(shuffled)
    for name in case.modules:
        assert close(dense(second, name), dense(first, name), tolerance=1e-5)


@every
@given(case=cases())
def test_the_scale_of_the_weights_does_not_matter(row: Row, case: Case) -> None:
    case = row.prepare(case)
    scaled = [dataclasses.replace(part, weight=part.weight * 4) for part in case.parts]
    for name in case.modules:
        assert close(dense(row.rule(scaled), name), dense(row.rule(case.parts), name), tolerance=1e-6)


@pytest.mark.parametrize("row", [row for row in ROWS if row.weight_two], ids=lambda row: row.name)
@given(case=cases())
def test_weight_two_is_two_clients_of_weight_one(row: Row, case: Case) -> None:
    case = row.prepare(case)
    first = case.parts[0]
    twice = [dataclasses.replace(first, weight=2 * first.weight), *case.parts[1:]]
    copies = [first, *case.parts[1:], dataclasses.replace(first, client="copy")]
    for name in case.modules:
        assert close(dense(row.rule(copies), name), dense(row.rule(twice), name), tolerance=1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if row.exact], ids=lambda row: row.name)
@given(case=cases(), mixed=cases(mixed_ranks=True))
def test_exact_rules_are_exact(row: Row, case: Case, mixed: Case) -> None:
    case = row.prepare(mixed if row.mixed_ranks else case)
    answer = row.rule(case.parts)
    for name, column in case.modules.items():
        scale = sum(abs(c.weight) * np.abs(c.scaling * c.B @ c.A) for c in column)
        assert close(dense(answer, name), oracle.target(column), scale, tolerance=1e-6)


@pytest.mark.parametrize("row", [row for row in ROWS if row.gauge_free], ids=lambda row: row.name)
@given(case=cases(equal_scalings=True))
def test_product_rules_ignore_the_gauge(row: Row, case: Case) -> None:
    case = row.prepare(case)
    turned = _turned(case)
    for name, column in case.modules.items():
        assert close(dense(row.rule(turned), name), dense(row.rule(case.parts), name), oracle.target(column), 1e-6)


def test_the_mean_of_factors_depends_on_the_gauge() -> None:
    """The negative test: were this to hold, the gauge test above would prove nothing."""
    case = make_case(0, 3, 2, [(7, 12)], equal_scalings=True)
    assert not close(dense(mean(_turned(case)), "layer.0.q"), dense(mean(case.parts), "layer.0.q"), tolerance=1e-2)


def _turned(case: Case) -> list[Contribution]:
    rng = np.random.default_rng(1)
    result = []
    for part in case.parts:
        modules = {}
        for name, pair in part.adapter.modules.items():
            G = torch.from_numpy(np.linalg.qr(rng.normal(size=(pair.rank, pair.rank)))[0] * rng.uniform(0.5, 2))
            modules[name] = LoraFactors(pair.B @ G, torch.linalg.inv(G) @ pair.A, pair.scaling)
        result.append(Contribution(part.client, Adapter(modules, part.adapter.extra), part.weight))
    return result


@every
@given(case=cases())
def test_inputs_stay_as_they_were_and_outputs_are_new(row: Row, case: Case) -> None:
    case = row.prepare(case)
    before = [{n: t.clone() for n, t in part.adapter.tensors().items()} for part in case.parts]
    answer = row.rule(case.parts)
    owned = {t.data_ptr() for part in case.parts for t in part.adapter.tensors().values()}
    for part, old in zip(case.parts, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in part.adapter.tensors().items())
    assert all(tensor.data_ptr() not in owned for tensor in answer.tensors().values())


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_rank_are_kept(row: Row, dtype: torch.dtype) -> None:
    case = row.prepare(make_case(1, 4, 3, [(7, 12), (16, 5)], dtype=dtype))
    answer = row.rule(case.parts)
    for tensor in answer.tensors().values():
        assert tensor.dtype == dtype
    if row.keeps_rank:
        assert {pair.rank for pair in answer.modules.values()} == {3}
    assert torch.allclose(
        answer.extra["head.weight"].double(), torch.full((2, 3), _mean_head(case), dtype=torch.float64), rtol=1e-2
    )


def _mean_head(case: Case) -> float:
    column = case.modules["layer.0.q"]
    return float(sum(w * u for u, w in enumerate(oracle.shares(column))))


@every
@given(case=cases())
def test_no_rule_of_its_rank_beats_best_rank(row: Row, case: Case) -> None:
    case = row.prepare(case)
    if not row.keeps_rank:
        return
    plain = [dataclasses.replace(part, adapter=folded(part.adapter)) for part in case.parts]
    best, answer = best_rank(plain, case.rank), row.rule(case.parts)
    for name, column in case.modules.items():
        slack = 1e-9 * np.linalg.norm(oracle.target(column))
        assert error(best, case, name) <= error(answer, case, name) + slack


@given(case=cases(mixed_ranks=True), rank=st.integers(1, 6))
def test_best_rank_is_the_truncated_dense_svd(case: Case, rank: int) -> None:
    answer = best_rank(case.parts, rank)
    for name, column in case.modules.items():
        wanted = oracle.best_rank(oracle.target(column), rank)
        missed = np.linalg.norm(oracle.target(column) - wanted)
        assert abs(error(answer, case, name) - missed) <= 1e-9 * np.linalg.norm(oracle.target(column))


@given(case=cases())
def test_mean_is_the_oracles_fedit(case: Case) -> None:
    for name, column in case.modules.items():
        assert close(dense(mean(case.parts), name), oracle.fedit(column), tolerance=1e-12)


@given(case=cases(), penalty=st.sampled_from([0.0, 0.01, 1.0, 1e9]))
def test_lora_fair_is_the_dense_ridge_solution(case: Case, penalty: float) -> None:
    """B of the least penalised error, by dense least squares over [A_hat | sqrt(lambda) I]."""
    answer = corrected_mean(case.parts, penalty)
    for name, column in case.modules.items():
        weights, scaling = oracle.shares(column), max(c.scaling for c in column)
        A = sum(w * c.A for w, c in zip(weights, column, strict=True))
        B = sum(w * c.scaling / scaling * c.B for w, c in zip(weights, column, strict=True))
        missed = oracle.target(column) / scaling - B @ A
        ridge = penalty * np.trace(A @ A.T) / len(A)
        wide = np.hstack([A, np.sqrt(ridge) * np.eye(len(A))])  # min |dB wide - [missed | 0]|
        right = np.hstack([missed, np.zeros((len(missed), len(A)))])
        correction = np.linalg.lstsq(wide.T, right.T, rcond=None)[0].T
        assert close(dense(answer, name), scaling * (B + correction) @ A, oracle.target(column), 1e-6)


@given(case=cases(equal_scalings=True))
def test_aligning_keeps_the_product_and_undoes_any_rotation(case: Case) -> None:
    """Clients that hold one product in rotated bases: the plain mean errs, the rotated mean does not."""
    rng = np.random.default_rng(2)
    one = case.parts[0].adapter
    parts = []
    for part in case.parts:
        modules = {}
        for name, pair in one.modules.items():
            turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(pair.rank, pair.rank)))[0])
            modules[name] = LoraFactors(pair.B @ turn, turn.T @ pair.A, pair.scaling)
            again = align(modules[name], part.adapter.modules[name])
            assert torch.allclose(again.B @ again.A, pair.B @ pair.A, atol=1e-9 * float((pair.B @ pair.A).norm()))
        parts.append(Contribution(part.client, Adapter(modules, part.adapter.extra), part.weight))
    for name, pair in one.modules.items():
        truth = (pair.scaling * pair.B @ pair.A).numpy()
        assert close(dense(rotated_mean(parts, one), name), truth, tolerance=1e-8)


def test_a_bounded_remainder_loses_only_its_tail() -> None:
    case = make_case(6, 4, 2, [(12, 16)])
    whole, cut = mean_and_remainder(case.parts), mean_and_remainder(case.parts, rank=2)
    assert cut.remainder.modules["layer.0.q"].rank == 2
    missed = dense(combined(cut.adapter, cut.remainder), "layer.0.q") - oracle.target(case.modules["layer.0.q"])
    tail = np.linalg.svd(dense(whole.remainder, "layer.0.q"), compute_uv=False)[2:]
    assert np.linalg.norm(missed) == pytest.approx(np.linalg.norm(tail), rel=1e-6)


def _broken(row: Row, kind: str) -> tuple[list[Contribution], str]:
    """Three good clients of which the second is broken, and what the message must name."""
    case = row.prepare(make_case(2, 3, 2, [(7, 12), (5, 9)]))
    parts = list(case.parts)
    modules, extra = dict(parts[1].adapter.modules), dict(parts[1].adapter.extra)
    pair = modules["layer.1.q"]
    match kind:
        case "missing module":
            del modules["layer.1.q"]
        case "foreign module":
            modules["layer.9.q"] = pair
        case "shape":
            modules["layer.1.q"] = LoraFactors(pair.B[:4], pair.A, pair.scaling)
        case "nan":
            modules["layer.1.q"] = LoraFactors(pair.B * torch.nan, pair.A, pair.scaling)
        case "infinite":
            A = pair.A.clone()
            A[0, 0] = torch.inf
            modules["layer.1.q"] = LoraFactors(pair.B, A, pair.scaling)
        case "dtype":
            modules["layer.1.q"] = LoraFactors(pair.B.float(), pair.A.float(), pair.scaling)
        case "missing head":
            extra = {}
        case "head shape":
            extra["head.weight"] = torch.zeros(3, 2, dtype=torch.float64)
    cores = {name: core for name, core in parts[1].adapter.cores.items() if name in modules}
    parts[1] = Contribution("c1", Adapter(modules, extra, cores), parts[1].weight)
    return parts, "head.weight" if "head" in kind else ("layer.9.q" if "foreign" in kind else "layer.1.q")


@every
@pytest.mark.parametrize(
    "kind",
    ["missing module", "foreign module", "shape", "nan", "infinite", "dtype", "missing head", "head shape"],
)
def test_a_malformed_client_is_named(row: Row, kind: str) -> None:
    parts, thing = _broken(row, kind)
    with pytest.raises(InputError) as caught:
        row.rule(parts)
    assert "'c1'" in str(caught.value)
    assert thing in str(caught.value)
    if kind == "shape":
        assert "(4, 9)" in str(caught.value)
        assert "(5, 9)" in str(caught.value)


@every
@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_senseless_weights_are_refused(row: Row, weights: list[float]) -> None:
    case = row.prepare(make_case(3, 2, 2, [(7, 12)]))
    parts = [dataclasses.replace(part, weight=w) for part, w in zip(case.parts, weights, strict=True)]
    with pytest.raises(InputError, match="weight"):
        row.rule(parts)


@every
def test_nothing_to_aggregate_is_an_error(row: Row) -> None:
    with pytest.raises((InputError, ValueError, IndexError)):
        row.rule([])


@pytest.mark.parametrize("row", [row for row in ROWS if row.prepare is as_they_are], ids=lambda row: row.name)
def test_mixed_ranks_work_or_are_refused_with_both_shapes(row: Row) -> None:
    case = make_case(4, 3, 2, [(7, 12)], mixed_ranks=True)
    if row.mixed_ranks:
        assert row.rule(case.parts).modules["layer.0.q"].rank >= 3
        return
    with pytest.raises(InputError) as caught:
        row.rule(case.parts)
    assert "(7, 3)" in str(caught.value)
    assert "(7, 2)" in str(caught.value)
