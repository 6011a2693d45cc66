"""What [train] offers beside plain AdamW: each against a loop or a formula of its own, and its place in a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from florana.errors import RecipeError
from florana.federation.step_bounds import clipped_sgd
from florana.recipe.load import check
from florana.recipe.schema import Recipe, Train
from florana.runs.prepared import Setup, prepare
from florana.runs.setup import execute
from florana.train.client import rows_per_step, steps_per_round, train_locally
from florana.train.local_loss import smoothed
from florana.train.optimizer import curve, optimizer_of, reach, require_optimizer


@pytest.fixture
def setup(recipe: Recipe) -> Setup:
    return prepare(recipe)


def trained(setup: Setup, recipe: Recipe, place: tuple[int, int] = (1, 1), **changes: Any) -> dict[str, Tensor]:
    setup.bench.load(setup.start)
    given_ = recipe.train.model_dump(exclude_none=True) | changes
    train_locally(setup.bench, setup.clients["client-0"].train, Train(**given_), 5, lambda: None, None, place)
    return setup.bench.adapter().tensors()


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def by_hand(setup: Setup, recipe: Recipe, step: Callable[[list[Tensor], list[Tensor], int], None]) -> dict[str, Tensor]:
    """The same rows in the same order, each step's clipped gradients given to `step(parameters, received, t)`."""
    setup.bench.load(setup.start)
    bench, rows = setup.bench, setup.clients["client-0"].train
    bench.model.train()
    parameters: list[Tensor] = list(bench.trainable)
    received = [p.detach().clone() for p in parameters]
    rng, order = np.random.default_rng(5), []
    with torch.random.fork_rng():
        torch.manual_seed(5)  # dropout
        for t in range(recipe.train.steps or 0):
            if not order:
                order = rng.permutation(len(rows)).tolist()
            chosen, order = order[: recipe.train.batch_size], order[recipe.train.batch_size :]
            bench.forward(bench.batch([rows[i] for i in chosen])).loss.backward()
            step(parameters, received, t)
            for parameter in parameters:
                parameter.grad = None
    return bench.adapter().tensors()


def test_sgd_with_momentum_is_its_formula(setup: Setup, recipe: Recipe) -> None:
    """v = momentum v + g, w = w - lr v, with gradients clipped to norm 1."""
    velocity: list[Tensor] = []

    def step(parameters: list[Tensor], received: list[Tensor], t: int) -> None:
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))  # type: ignore[union-attr]
        scale = min(1.0, 1.0 / (norm + 1e-6))
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                gradient = scale * parameter.grad  # type: ignore[operator]
                if t == 0:
                    velocity.append(gradient)
                else:
                    velocity[index] = 0.5 * velocity[index] + gradient
                parameter -= 0.2 * velocity[index]

    wanted = by_hand(setup, recipe, step)
    found = trained(setup, recipe, optimizer="sgd", momentum=0.5, learning_rate=0.2)
    assert far(found, wanted) < 1e-6
    assert far(found, setup.start.tensors()) > 1e-3


def test_fedprox_adds_mu_times_the_distance_to_the_gradient(setup: Setup, recipe: Recipe) -> None:
    """The gradient of loss + mu / 2 ||w - w_0||^2 is that of the loss plus mu (w - w_0); unclipped SGD shows it."""

    def step(parameters: list[Tensor], received: list[Tensor], t: int) -> None:
        with torch.no_grad():
            for parameter, before in zip(parameters, received, strict=True):
                parameter -= 0.5 * (parameter.grad + 0.7 * (parameter - before))  # type: ignore[operator]

    wanted = by_hand(setup, recipe, step)
    plain = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.5, "max_grad_norm": None}
    unclipped = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_grad_norm": None})})
    setup.bench.load(setup.start)
    settings_ = unclipped.train.model_copy(update=plain | {"proximal_mu": 0.7})
    train_locally(setup.bench, setup.clients["client-0"].train, settings_, 5, lambda: None)
    found = setup.bench.adapter().tensors()
    assert far(found, wanted) < 1e-6
    train_locally(setup.bench, setup.clients["client-0"].train, settings_, 5, lambda: None)
    assert far(setup.bench.adapter().tensors(), found) > 0, "the next round's anchor is what it begins with"


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_accumulated_batches_are_one_large_batch(task: str, tiny_bert: Path, tiny_llama: Path, sentences: Path) -> None:
    """Also where batches have unlike numbers of tokens, and the last of a pass is shorter; without dropout."""
    table: dict[str, Any] = {
        "task": task,
        "model": {
            "base": str(tiny_bert if task != "causal-lm" else tiny_llama),
            "rank": 2,
            "target_modules": "all-linear",
        },
        "data": {"train": str(sentences), "text": "text", "label": "label", "max_length": 16},
        "partition": {"clients": 2},
        "train": {"steps": 4, "batch_size": 6, "learning_rate": 0.1, "optimizer": "sgd"},
        "federation": {"rounds": 1},
        "strategy": {"name": "fedit"},
    }
    recipe = check(table, "t")
    setup = prepare(recipe)
    for module in setup.bench.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = setup.clients["client-0"].train[:15]

    def after(size: int, batches: int) -> dict[str, Tensor]:
        setup.bench.load(setup.start)
        settings_ = recipe.train.model_copy(update={"batch_size": size, "gradient_accumulation_steps": batches})
        train_locally(setup.bench, rows, settings_, 5, lambda: None)
        return {n: p.detach().clone() for n, p in setup.bench.model.named_parameters() if p.requires_grad}

    whole, parts = after(6, 1), after(2, 3)
    assert far(whole, parts) < 1e-6
    assert far(whole, after(2, 1)) > 1e-4


def test_an_epoch_has_a_step_for_each_accumulated_batch() -> None:
    train = Train(epochs=2, batch_size=4, gradient_accumulation_steps=3)
    assert rows_per_step(train, 30) == 12
    assert steps_per_round(train, 30) == 6
    assert rows_per_step(train, 5) == 5


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from(["run", "round"]),
)
def test_a_schedule_is_transformers_curve_from_round_to_round(
    name: str, steps: int, rounds: int, warmup: float, over: str
) -> None:
    train = Train(steps=steps, lr_schedule=name, warmup_ratio=warmup, lr_schedule_over=over)  # type: ignore[arg-type]
    found = [curve(train, steps, round_, rounds)(step) for round_ in range(1, rounds + 1) for step in range(steps)]
    length = steps * rounds if over == "run" else steps
    rising = round(warmup * length)
    if name == "constant":
        later = [1.0] * length
    elif name == "linear":
        later = [(length - t) / max(1, length - rising) for t in range(length)]
    else:
        later = [0.5 * (1 + math.cos(math.pi * (t - rising) / max(1, length - rising))) for t in range(length)]
    one = [(t + 1) / rising if t < rising else later[t] for t in range(length)]
    assert found == pytest.approx(one * (1 if over == "run" else rounds))
    assert all(0 <= factor <= 1 for factor in found)
    assert all(factor > 0 for factor in found)


def test_the_rate_of_a_step_is_the_schedules(setup: Setup, recipe: Recipe) -> None:
    """Round 2 of 2 of a linear schedule: SGD's steps shrink as the curve says."""
    steps = recipe.train.steps or 0
    wanted = by_hand(
        setup, recipe, lambda parameters, received, t: descend(parameters, 0.3 * (steps - t) / (2 * steps))
    )
    setup.bench.load(setup.start)
    plain = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.3, "max_grad_norm": None, "lr_schedule": "linear"}
    train = recipe.train.model_copy(update=plain)
    train_locally(setup.bench, setup.clients["client-0"].train, train, 5, lambda: None, None, (2, 2))
    assert far(setup.bench.adapter().tensors(), wanted) < 1e-6


def descend(parameters: list[Tensor], rate: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter -= rate * parameter.grad  # type: ignore[operator]


def test_loraplus_gives_b_a_rate_of_its_own(setup: Setup, recipe: Recipe) -> None:
    """Of one plain SGD step: B moves ratio times as far, A and the head as before."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "max_grad_norm": None, "steps": 1}
    before = setup.start.tensors()
    one, other = (trained(setup, recipe, **plain, **more) for more in ({}, {"loraplus_lr_ratio": 4.0}))
    for name, start in before.items():
        ratio = 4.0 if name.startswith("B/") else 1.0
        assert torch.allclose(other[name] - start, ratio * (one[name] - start), atol=1e-7), name


def test_smoothed_labels_are_the_formula() -> None:
    class Output:
        logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))

    labels = torch.tensor([[1, -100, 3, 4, 0], [-100, -100, 6, -100, 2]])
    total, count = 0.0, 0
    for row in range(2):
        for t in range(4):
            if (target := int(labels[row, t + 1])) == -100:
                continue
            logs = torch.log_softmax(Output.logits[row, t].double(), 0)
            wanted = torch.full((7,), 0.2 / 7, dtype=torch.float64)
            wanted[target] += 0.8
            total, count = total - float((wanted * logs).sum()), count + 1
    assert float(smoothed(Output, labels, 0.2)) == pytest.approx(total / count, rel=1e-6)


def test_the_loss_that_is_reported_is_the_models_own(setup: Setup, recipe: Recipe) -> None:
    rows = setup.clients["client-0"].train
    once = recipe.train.model_copy(update={"steps": 1})
    losses = []
    for more in ({}, {"label_smoothing": 0.3}, {"proximal_mu": 5.0}, {"gradient_accumulation_steps": 1}):
        setup.bench.load(setup.start)
        losses.append(train_locally(setup.bench, rows, once.model_copy(update=more), 5, lambda: None))
    assert losses == [losses[0]] * 4


CHANGES: list[dict[str, Any]] = [
    {"optimizer": "sgd", "learning_rate": 0.1},
    {"optimizer": "adafactor"},
    {"lr_schedule": "cosine", "warmup_ratio": 0.25},
    {"gradient_accumulation_steps": 2, "batch_size": 4},
    {"autocast": "bfloat16"},
    {"label_smoothing": 0.1},
    {"proximal_mu": 0.1},
    {"loraplus_lr_ratio": 16.0, "learning_rate": 1e-3},
    {"neftune_noise_alpha": 5.0},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_setting_trains_repeats_itself_and_leaves_the_model_as_it_was(
    change: dict[str, Any], setup: Setup, recipe: Recipe
) -> None:
    plain = trained(setup, recipe)
    first, second = trained(setup, recipe, **change), trained(setup, recipe, **change)
    assert far(first, second) == 0
    assert far(first, plain) > 0, "the setting does something"
    assert far(trained(setup, recipe), plain) == 0, "and leaves nothing behind"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in first.values())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    change: dict[str, Any], recipe: Recipe, tmp_path: Path
) -> None:
    """A schedule knows where it is by the round alone; the gate takes what each optimizer does."""
    table = recipe.model_dump(exclude_none=True)
    table["train"] |= change
    table["federation"]["rounds"] = 3
    own = check(table, "r")
    refused: list[str] = []
    execute(
        own, tmp_path / "whole", show=lambda event: refused.append(event.detail) if event.kind == "refused" else None
    )
    assert refused == []
    cut: list[int] = []

    class Cut(Exception):  # noqa: N818
        pass

    def show(event: Any) -> None:
        assert event.kind != "refused", event.detail
        if event.kind == "committed":
            cut.append(1)
            if len(cut) == 2:
                raise Cut

    with pytest.raises(Cut):
        execute(own, tmp_path / "cut", show=show)
    execute(own, tmp_path / "cut", resume=True)
    whole, resumed = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == resumed.read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
    st.floats(1e-3, 1.0),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_no_gradients_move_a_number_further_than_clipped_sgd_can(
    gradients: list[float], rate: float, momentum: float
) -> None:
    number = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([number], lr=rate, momentum=momentum)
    for gradient in gradients:
        number.grad = torch.tensor([gradient], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([number], 2.0)
        optimizer.step()
    assert abs(float(number.detach())) <= clipped_sgd(rate, momentum, 2.0, len(gradients)).moves * (1 + 1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_gradients_of_one_direction_attain_what_clipped_sgd_can(momentum: float) -> None:
    number = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([number], lr=0.3, momentum=momentum)
    for _ in range(12):
        number.grad = torch.tensor([100.0], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([number], 2.0)
        optimizer.step()
    assert -float(number.detach()) == pytest.approx(clipped_sgd(0.3, momentum, 2.0, 12).moves, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_claim_of_a_thousand_million_rows_costs_no_time(optimizer: str) -> None:
    """A site's number of rows says how many steps its update may have had: bounding them must not take as many."""
    train = Train(epochs=100, batch_size=1, optimizer=optimizer)  # type: ignore[arg-type]
    started = time.process_time()
    many = reach(train, steps_per_round(train, 10**9))
    assert time.process_time() - started < 5
    few = reach(train, 200_000)
    assert many is not None
    assert few is not None
    assert math.isfinite(many.moves)
    assert many.moves == pytest.approx(few.moves * 5e5, rel=1e-2)


def test_where_an_optimizer_bounds_its_steps_the_gate_knows(recipe: Recipe) -> None:
    zero = torch.zeros(1)
    plus = reach(Train(steps=3, loraplus_lr_ratio=8.0), 3)
    assert plus is not None
    assert float(plus.of("B/q", zero, {"A", "B"})) == pytest.approx(8 * float(plus.of("A/q", zero, {"A", "B"})))
    assert reach(Train(steps=3, optimizer="sgd"), 3) is not None
    assert reach(Train(steps=3, optimizer="sgd", max_grad_norm=None), 3) is None
    assert reach(Train(steps=3, optimizer="sgd", weight_decay=0.1), 3) is None
    assert reach(Train(steps=3, optimizer="adafactor"), 3) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"momentum": 0.5}, "train.momentum is of train.optimizer = 'sgd'"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
        ({"lr_schedul": "linear"}, "lr_schedule"),
        ({"proximal_mu": -1.0}, "proximal_mu"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], why: str, recipe: Recipe) -> None:
    table = recipe.model_dump(exclude_none=True)
    table["train"] |= change
    with pytest.raises(RecipeError, match=why):
        check(table, "r")


def test_scores_have_no_labels_to_smooth(recipe: Recipe) -> None:
    table = recipe.model_dump(exclude_none=True) | {"task": "sequence-regression"}
    table["train"] |= {"label_smoothing": 0.1}
    with pytest.raises(RecipeError, match="a score has none"):
        check(table, "r")


def test_eight_bit_moments_need_their_library_and_a_gpu() -> None:
    with pytest.raises(RecipeError, match=r"bitsandbytes|CUDA"):
        require_optimizer(Train(steps=1, optimizer="adamw-8bit"), torch.device("cpu"))


def test_plain_adamw_is_torchs() -> None:
    made = optimizer_of(Train(steps=1), [torch.nn.Parameter(torch.zeros(1))], [])
    assert type(made) is torch.optim.AdamW
