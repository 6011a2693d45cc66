"""The plan of a model: counts from configurations alone, against published sizes and against messages really packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModel

from florana.errors import InputError, RecipeError
from florana.federation.messages import pack
from florana.lora.factors import Adapter, Contribution, LoraFactors
from florana.runs.cost_model import FULL, plan_model
from florana.strategy import STRATEGIES
from florana.train.shapes import PRESETS, shapes_of
from tests.program import florana

SIZES = {  # published parameter counts without the output layer
    "roberta-large": 355_359_744,
    "llama-2-7b": 6_738_415_616 - 32_000 * 4096,
    "llama-3-8b": 8_030_261_248 - 128_256 * 4096,
    "mistral-7b": 7_241_732_096 - 32_000 * 4096,
    "gemma-2-9b": 9_241_705_984,  # input and output layer are one
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name: str) -> None:
    assert shapes_of(name).parameters == SIZES[name]


def test_the_papers_count_for_roberta_large() -> None:
    """98,304 r numbers per direction and client for query and value of 24 layers."""
    shapes = shapes_of("roberta-large")
    for rank in (8, 16):
        plan = plan_model("m", shapes.modules, shapes.parameters, rank=rank, clients=10)
        lines = {line.method: line for line in plan.lines}
        assert lines["fedit"].up == lines["flora-na"].down == 98_304 * rank
        assert lines["ffa-lora"].up * 2 == lines["fedsa-lora"].up * 2 == lines["fedit"].up
        stack = 10 * lines["fedit"].down
        assert lines["flora"].down == stack + lines["fedit"].down // 2  # the stack and a fresh A
        assert lines["fedex-lora"].down == stack  # the mean and a remainder of rank 9 r
        assert lines["fed-sb"].up == 48 * rank * rank
        assert lines[FULL].up == shapes.parameters
        assert lines["fedit"].against_fedit == 1.0


def test_grouped_heads_and_all_linear_modules_are_counted_as_they_are() -> None:
    shapes = shapes_of("llama-3-8b", ["q_proj", "v_proj"]).modules
    assert shapes["layers.0.self_attn.q_proj"] == (4096, 4096)
    assert shapes["layers.0.self_attn.v_proj"] == (1024, 4096)
    assert len(shapes_of("llama-2-7b", ["all-linear"]).modules) == 224


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_counts_are_those_of_packed_messages(name: str, tiny_bert: Path) -> None:
    """Against a real model's modules and a strategy's own first payload: the very numbers, and a small header."""
    shapes = shapes_of(str(tiny_bert), ["query", "dense"])
    model = AutoModel.from_pretrained(tiny_bert)
    real = {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith(("query", "dense"))}
    assert dict(shapes.modules) == real
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    if name == "ravan":  # its default heads do not fit this model
        return
    (line, _) = plan_model(
        "m", shapes.modules, shapes.parameters, rank=2, clients=3, methods={name: {"name": name}}
    ).lines
    start = Adapter({n: LoraFactors(torch.zeros(o, 2), torch.randn(2, i), 1.0) for n, (o, i) in shapes.modules.items()})
    payload = STRATEGIES[name]().brief(STRATEGIES[name]().init(start), "c")
    if (sums := STRATEGIES[name]().sums) is not None:
        first = sums.measure(0, 1, {}, start, start)
        second = sums.measure(1, 1, sums.ask(start, [first]), start, start)
        assert line.up == sum(t.numel() for t in (*first.values(), *second.values()))
        return
    up = pack(payload.adapter, payload.work.up, blocks=payload.blocks)
    numbers = sum(t.numel() for t in load(up).values())
    assert line.up == numbers
    assert 0 < len(up) - 4 * numbers < 120 * (len(load(up)) + 1)
    down = sum(t.numel() for t in load(pack(payload.adapter, payload.work.down)).values())
    assert line.down >= down
    assert line.down_late >= line.down


@pytest.mark.parametrize(
    "table",
    [
        {"name": "best-rank", "broadcast_rank": 4},
        {"name": "best-rank", "broadcast_rank": 9},
        {"name": "fedex-lora", "residual_rank": 3},
        {"name": "flora", "residual_rank": 5},
        {"name": "frlora", "residual_rank": 3},
    ],
    ids=lambda table: "-".join(map(str, table.values())),
)
def test_options_are_counted(table: dict[str, Any]) -> None:
    """What is really broadcast in round 2 has as many numbers; nothing is allowed for that the option keeps back."""
    shapes = {"q": (12, 10), "v": (14, 11)}
    (line, _) = plan_model("m", shapes, 32, rank=2, clients=3, methods={"it": table}).lines
    strategy = STRATEGIES[table["name"]](**{key: value for key, value in table.items() if key != "name"})
    torch.manual_seed(0)

    def pair(out: int, into: int) -> LoraFactors:
        return LoraFactors(torch.randn(out, 2), torch.randn(2, into), 1.0)

    state = strategy.init(Adapter({name: pair(*shape) for name, shape in shapes.items()}))
    parts = [
        Contribution(c, Adapter({name: pair(*shape) for name, shape in shapes.items()}), 1 / 3, state.residual)
        for c in "abc"
    ]
    payload = strategy.brief(strategy.step(state, parts).state, "a")
    sent = sum(t.numel() for t in load(pack(payload.adapter, payload.work.down, payload.residual)).values())
    assert line.down == sent
    assert line.down_late >= line.down


def test_what_is_wrong_is_named() -> None:
    shapes = {"q": (8, 4)}
    for options, message in (
        ({"rank": 5}, "above the smaller side of module 'q', 4"),
        ({"rank": 0}, "must be at least 1"),
        ({"rank": 2, "methods": {"fedt": {"name": "fedt"}}}, "no strategy 'fedt'"),
        ({"rank": 2, "methods": {"x": {"name": "best-rank", "skech": 3}}}, "unknown key 'strategy.skech'"),
        ({"rank": 2, "methods": {"ravan": {"name": "ravan"}}}, "ravan: its rank 64 is above"),
    ):
        with pytest.raises(RecipeError, match=message):
            plan_model("m", shapes, 32, clients=2, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no module 'qury'"):
        shapes_of("roberta-large", ["qury"])


def test_plan_on_the_command_line(tiny_bert: Path, tmp_path: Path) -> None:
    done = florana("plan", str(tiny_bert), "--rank", "2", "--clients", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lines"][0]["method"] == "fedit"
    shown = florana("plan", "roberta-large", "--methods", "fedit,flora")
    assert "of FedIT" in shown.stdout
    wrong = florana("plan", str(tmp_path))
    assert wrong.returncode == 3
    assert "holds no usable config.json" in wrong.stderr
    assert "Traceback" not in wrong.stderr
