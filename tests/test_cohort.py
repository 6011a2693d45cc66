"""`[engine] cohort`: clients that share a pass get the adapters that each gets alone, and none sees another."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from florana.errors import FloranaError, InputError, RecipeError
from florana.federation.journal import read_records
from florana.lora.factors import Adapter, LoraFactors
from florana.recipe.load import check
from florana.recipe.schema import Model, Recipe, Train
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.strategy import STRATEGIES
from florana.strategy.base import Pruning
from florana.train import cohort_engine, cohort_probe
from florana.train.client import train_locally
from florana.train.cohort import Member, clip_each, train_together
from florana.train.cohort_probe import require_together
from florana.train.model import Workbench
from florana.train.pruning import penalty_of
from tests.conftest import ROOT
from tests.families import FAMILIES, LANGUAGE

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def made(table: dict[str, Any], **sections: Any) -> Recipe:
    table = copy.deepcopy(table)
    for name, change in sections.items():
        table[name] = {**table.get(name, {}), **change} if isinstance(change, dict) else change
    return check(table, "test")


def language(table: dict[str, Any], tiny_llama: Path) -> dict[str, Any]:
    model = {"base": str(tiny_llama), "target_modules": ["q_proj", "down_proj"], "rank": 2, "alpha": 6}
    data = {key: value for key, value in table["data"].items() if key != "label"} | {"max_length": 40}
    return {**table, "task": "causal-lm", "model": model, "data": data, "partition": {"kind": "length", "clients": 4}}


def in_double(bench: Workbench) -> None:
    """The whole model in float64, the head's inputs left as they come, and no bias at the zero of a fresh model."""
    bench.model.double()
    draws = torch.Generator().manual_seed(0)
    for name, parameter in bench.frozen():
        if name.endswith("bias"):
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    for module in bench.model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save["default"]._forward_pre_hooks.clear()


def started(bench: Workbench, seed: int, core: int = 0) -> Adapter:
    """A float64 adapter that no other client has: every factor, head and core with noise of its own."""
    draws = torch.Generator().manual_seed(seed)

    def noisy(tensor: Tensor) -> Tensor:
        return tensor.double() + 0.1 * torch.randn(tensor.shape, generator=draws, dtype=torch.float64)

    plain = bench.adapter()
    modules = {n: LoraFactors(noisy(p.B), noisy(p.A), p.scaling) for n, p in plain.modules.items()}
    cores = {n: torch.randn(core, 2 // core, 2 // core, generator=draws).double() for n in modules} if core else {}
    return Adapter(modules, {name: noisy(tensor) for name, tensor in plain.extra.items()}, cores)


def alone(bench: Workbench, member: Member, settings: Train, trains: Sequence[str]) -> dict[str, Tensor]:
    """What `train_locally` makes of one client, in the dtype it is trained in."""
    bench.load(member.adapter, None, trains, member.blocks)
    term = penalty_of(bench.factors, member.pruning) if member.pruning is not None else None
    train_locally(bench, member.examples, settings, member.seed, lambda: None, term, (2, 3))
    found = {f"{kind}/{n}": getattr(p, kind).detach() for n, p in bench.factors.items() for kind in "AB"}
    found |= {f"extra/{name}": tensor.detach() for name, tensor in bench._extra.items()}
    return {name: tensor.clone() for name, tensor in found.items()} | {
        f"core/{name}": core for name, core in bench.adapter().cores.items()
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"train": {"max_grad_norm": 0.01}},
    "not clipped": {"train": {"max_grad_norm": None, "weight_decay": 0.1}},
    "sgd": {"train": {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.1}},
    "epochs of unequal lengths": {"train": {"steps": None, "epochs": 2}},
    "accumulated": {"train": {"batch_size": 3, "gradient_accumulation_steps": 3, "steps": 5}},
    "schedule": {"train": {"lr_schedule": "cosine", "warmup_ratio": 0.2}},
    "lora+ and smoothing": {"train": {"loraplus_lr_ratio": 4.0, "label_smoothing": 0.1}},
    "proximal": {"train": {"proximal_mu": 3.0}},
    "b alone": {"trains": ("B", "extra")},
    "dora": {"model": {"variant": "dora"}},
    "core": {"core": 1, "trains": ("core",)},
    "own blocks of cores": {"core": 2, "trains": ("core", "scale"), "blocks": ([0], [1], [0], [1])},
    "pruning": {"pruning": (None, Pruning(1, 0.3), Pruning(1, 0.1), None)},
    "language": {"language": True},
    "language, accumulated": {
        "language": True, "train": {"batch_size": 2, "gradient_accumulation_steps": 2, "label_smoothing": 0.2}
    },
    "language, packed": {"language": True, "train": {"packing": True, "batch_size": 2}},
    "regression": {"regression": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_clients_step_is_the_one_it_makes_alone(
    case: str, recipe_table: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """In float64, from unlike adapters, on unequal shares, to 1e-10; cores and some losses of the peer are float32."""
    given = CASES[case]
    table = {**recipe_table, "partition": {"kind": "dirichlet", "clients": 4, "alpha": 0.7}}
    if given.get("language"):
        table = language(recipe_table, tiny_llama)
    if given.get("regression"):
        scored = tmp_path / "scored.csv"
        scored.write_text(Path(table["data"]["train"]).read_text().replace(",1\n", ",0.75\n"))
        table = {**table, "task": "sequence-regression", "partition": {"kind": "iid", "clients": 4}}
        table["data"] = {**table["data"], "train": str(scored)}
    recipe = made(table, model={**given.get("model", {})}, train={**given.get("train", {})})
    setup = prepare(recipe)
    without_dropout(setup.bench)
    if not given.get("regression"):  # labels are float32, and torch's mean squared error wants one type
        in_double(setup.bench)
    trains = given.get("trains", ("A", "B", "extra"))
    single = given.get("language") or given.get("regression") or recipe.train.label_smoothing or "core" in trains
    begun = started_single if given.get("regression") else started
    clients = [data.bins for _, data in sorted(setup.clients.items())]
    members = [
        Member(begun(setup.bench, place, given.get("core", 0)), rows, 10 + place, blocks, pruning)
        for place, (rows, blocks, pruning) in enumerate(
            zip(clients, given.get("blocks", [None] * 4), given.get("pruning", [None] * 4), strict=True)
        )
    ]
    setup.bench.load(members[0].adapter)
    together = train_together(setup.bench, members, recipe.train, trains, (2, 3))
    for member, result in zip(members, together, strict=True):
        assert isinstance(result, tuple), result
        apart = alone(setup.bench, member, recipe.train, trains)
        before = member.adapter.tensors()
        assert result[0].keys() == apart.keys()
        for name, tensor in apart.items():
            near = 5e-6 if single else 1e-10
            assert float((result[0][name] - tensor).abs().max()) < near, name
        moved = {name.partition("/")[0] for name, tensor in apart.items() if (tensor != before[name]).any()}
        assert moved == {*trains, "extra"} & {name.partition("/")[0] for name in before}


def without_dropout(bench: Workbench) -> None:
    for module in bench.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def test_a_client_sees_nobody_beside_it(recipe_table: dict[str, Any]) -> None:
    """With dropout: other rows, another seed and a diverging neighbour leave each bit of a client as it was."""
    setup = prepare(made(recipe_table, model={"dropout": 0.3}))
    settings = Train(steps=3, batch_size=8, learning_rate=0.01)
    rows = [data.bins for _, data in sorted(setup.clients.items())]
    longest = max(len(row.ids) for one in rows for row in one)
    rows = [[row for row in one if len(row.ids) < longest] for one in rows]
    adapters = [started_single(setup.bench, place) for place in range(3)]

    def first_two(third: Member) -> list[Any]:
        members = [Member(adapters[place], rows[place], place) for place in range(2)]
        return train_together(setup.bench, [*members, third], settings, ("A", "B", "extra"))

    plain = first_two(Member(adapters[2], rows[2], 2))
    worthless = Adapter(
        {name: LoraFactors(pair.B * float("inf"), pair.A, pair.scaling) for name, pair in adapters[2].modules.items()},
        adapters[2].extra,
    )
    for other in (Member(adapters[2], rows[0], 2), Member(adapters[2], rows[2], 77), Member(worthless, rows[2], 2)):
        changed = first_two(other)
        for place in range(2):
            for name, tensor in plain[place][0].items():
                assert torch.equal(tensor, changed[place][0][name]), name
        assert isinstance(changed[2], FloranaError) == (other.adapter is worthless)
        if other.adapter is not worthless:
            assert not torch.equal(changed[2][0]["extra/classifier.weight"], plain[2][0]["extra/classifier.weight"])


def started_single(bench: Workbench, seed: int, core: int = 0) -> Adapter:
    double = started(bench, seed, core)
    return Adapter(
        {n: LoraFactors(p.B.float(), p.A.float(), p.scaling) for n, p in double.modules.items()},
        {name: tensor.float() for name, tensor in double.extra.items()},
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_draws_what_it_draws_alone(attention: str, recipe_table: dict[str, Any]) -> None:
    """Where all rows are of one length, the masks are those of one client after the other: its stream is its own."""
    setup = prepare(made(recipe_table, model={"dropout": 0.3}))
    setup.bench.model.set_attn_implementation(attention)
    settings = Train(steps=4, batch_size=4, learning_rate=0.1, optimizer="sgd", momentum=0.0)
    common = [row for _, data in sorted(setup.clients.items()) for row in data.bins if len(row.ids) == 8]
    members = [Member(started_single(setup.bench, place), common[4 * place :][:4], place) for place in range(3)]
    together = train_together(setup.bench, members, settings, ("A", "B", "extra"))
    for member, result in zip(members, together, strict=True):
        setup.bench.load(member.adapter)
        train_locally(setup.bench, member.examples, settings, member.seed, lambda: None)
        for name, tensor in setup.bench.adapter().tensors().items():
            assert float((result[0][name] - tensor).abs().max()) < 2e-6, name  # type: ignore[index]


@pytest.mark.parametrize("method", sorted(STRATEGIES))
def test_a_run_ends_where_one_client_after_the_other_ends(
    method: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """Every strategy, over rounds, its residuals, kept factors and mixed ranks included; float32, plain SGD."""
    ranks = [2, 1] if method in ("hetlora", "best-rank", "flexlora", "flora") else None
    options = {"heads": 2, "size": 4, "heads_per_client": 1} if method == "ravan" else {}
    table = copy.deepcopy(recipe_table) | {"strategy": {"name": method, **options}}
    table["model"] |= {"dropout": 0.0} | ({"client_ranks": ranks} if ranks else {})
    table["train"] = {"steps": 3, "batch_size": 8, "learning_rate": 0.1, "optimizer": "sgd"}
    ends = []
    for cohort in (1, 3):
        recipe = made(table, engine={"cohort": cohort})
        setup = prepare(recipe)
        without_dropout(setup.bench)
        result = execute(recipe, tmp_path / str(cohort), setup=setup)
        ends.append(tensors_of(result.folder))
        assert all(len(record.clients) == 3 for record in result.records)
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        if ends[1][name].shape == tensor.shape:
            assert float((ends[1][name] - tensor).abs().max()) <= 1e-4 * max(1.0, float(tensor.abs().max())), name
            continue
        # the rank of a remainder is where its singular values reach rounding, so only its product is the same
        assert method == "fedex-lora", name
        one, other = (end[name.replace("lora_A", "lora_B")] @ end[name.replace("lora_B", "lora_A")] for end in ends)
        assert float((one - other).abs().max()) <= 1e-4 * max(1.0, float(one.abs().max())), name


def tensors_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted((folder / "adapter").rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def asked_of(folder: Path) -> list[int]:
    return [len(record.clients) for record in read_records(folder / "rounds.jsonl")]


def test_memory_that_runs_short_halves_the_cohort(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def short(bench: Workbench, members: Sequence[Member], *rest: Any) -> Any:
        sizes.append(len(members))
        if len(members) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return train_together(bench, members, *rest)

    monkeypatch.setattr(cohort_engine, "train_together", short)
    recipe = made(recipe_table, engine={"cohort": 4}, federation={"rounds": 2, "clients_per_round": 4})
    execute(recipe, tmp_path / "run")
    assert asked_of(tmp_path / "run") == [4, 4]
    assert sizes == [4, 2, 1, 1, 1, 1, *[1] * 4]
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.partition("WARNING ")[2] for line in lines] == [
        "memory is short for 4 clients at once: 2 from here on",
        "memory is short for 2 clients at once: 1 from here on",
    ]


def test_too_little_memory_for_one_is_that_clients_failure(
    recipe_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*rest: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(cohort_engine, "train_together", short)
    with pytest.raises(FloranaError, match="too little memory to train it"):
        execute(made(recipe_table, engine={"cohort": 2}), tmp_path / "run")


def test_a_client_without_rows_fails_alone(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = made(recipe_table, engine={"cohort": 4}, federation={"rounds": 1, "clients_per_round": 4})
    setup = prepare(recipe)
    empty = dataclasses.replace(setup.clients["client-1"], train=(), bins=())
    setup = dataclasses.replace(setup, clients={**setup.clients, "client-1": empty})
    (record,) = execute(recipe, tmp_path / "run", setup=setup).records
    assert list(record.clients) == ["client-0", "client-2", "client-3"]
    assert "no training rows" in record.refused["client-1"]


def test_a_resumed_run_goes_on_in_its_cohorts(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe = made(recipe_table, engine={"cohort": 2}, strategy={"name": "fedsa-lora"})
    whole = execute(recipe, tmp_path / "whole")
    execute(recipe, tmp_path / "cut", until=1)
    resumed = execute(recipe, tmp_path / "cut", resume=True)
    one, other = tensors_of(whole.folder), tensors_of(resumed.folder)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"engine": {"cohort": 2, "workers": 2}}, "engine.workers above 1"),
        ({"train": {"optimizer": "adafactor"}}, "train.optimizer = 'adafactor'"),
        ({"train": {"neftune_noise_alpha": 5.0}}, "train.neftune_noise_alpha"),
        ({"model": {"gradient_checkpointing": True}}, "model.gradient_checkpointing"),
    ],
)
def test_what_does_not_go_together_is_refused(
    change: dict[str, Any], reason: str, recipe_table: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=f"engine.cohort = 2 does not go with {reason}"):
        made(made_table(recipe_table, engine={"cohort": 2}), **change)


def made_table(table: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {**table, **sections}


def test_a_model_that_mixes_rows_is_refused(recipe_table: dict[str, Any]) -> None:
    setup = prepare(made(recipe_table))
    require_together(setup.bench, "tiny")
    layer = setup.bench.model.base_model.model.bert.encoder.layer[0]
    hook = layer.register_forward_hook(lambda module, args, output: output + 0.1 * output.mean(0, keepdim=True))
    with pytest.raises(InputError, match="depends on whose rows are in the batch"):
        require_together(setup.bench, "tiny")
    hook.remove()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(cohort_probe, "train_together", lambda *given: 1 / 0)
    with pytest.raises(InputError, match="ZeroDivisionError"):
        require_together(setup.bench, "tiny")
    monkey.undo()


def test_the_families_that_are_refused_are_those_that_the_docs_name(tmp_path: Path) -> None:
    """The probe itself compares a step together with the two alone, through each family's own layers and head."""
    refused = []
    for name, family in FAMILIES.items():
        for task in family.tasks:
            base = str(family.write(tmp_path / f"{name}-{task}"))
            labels = ("bad", "good") if task != LANGUAGE else ()
            made = Workbench(Model(base=base, rank=2, target_modules=family.targets), task, labels, 0)
            try:
                require_together(made, name)
            except InputError:
                refused.append(name)
    line = re.search(r"`engine.cohort` works with .* but ([^.]*)\.", (ROOT / "docs" / "models.md").read_text())
    assert line is not None
    assert re.split(r", | and ", line[1]) == list(dict.fromkeys(refused))


def test_each_clients_gradient_is_clipped_as_torch_clips_it() -> None:
    draws = torch.Generator().manual_seed(0)
    stacks = [torch.nn.Parameter(torch.zeros(3, 4, 5)), torch.nn.Parameter(torch.zeros(3, 7))]
    for stack in stacks:
        stack.grad = torch.randn(stack.shape, generator=draws) * torch.tensor([0.01, 1.0, 100.0]).reshape(
            3, *[1] * (stack.ndim - 1)
        )
    wanted = []
    for client in range(3):
        own = [torch.nn.Parameter(stack[client].detach().clone()) for stack in stacks]
        for parameter, stack in zip(own, stacks, strict=True):
            parameter.grad = stack.grad[client].clone()  # type: ignore[index]
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        wanted.append([parameter.grad for parameter in own])
    clip_each(stacks, 1.0)
    for client in range(3):
        for stack, grad in zip(stacks, wanted[client], strict=True):
            torch.testing.assert_close(stack.grad[client], grad)  # type: ignore[index]
