"""What the drop-in strategies take, what they refuse, and what importing them loads."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

pytest.importorskip("flwr", reason="the extra florana[flower] is not installed")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

import florana.flower
from florana.errors import InputError, RecipeError
from florana.flower.dropin.names import peft_name
from tests.flower_fake import (
    FakeGrid,
    answered,
    examples_of,
    following,
    initial,
    metrics,
)
from tests.flower_methods import METHODS, bytes_of, made, rounds

pytestmark = pytest.mark.usefixtures("launched")


def test_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match="client_ranks does not go with 'fedit'"):
        made("FedIT", client_ranks={})
    for rank in (0, 3, None, 1.0, True):
        with pytest.raises(RecipeError, match="client_ranks gives node"):
            rounds(made("HetLora", client_ranks=lambda node, rank=rank: rank), following)


def test_fedavgs_arguments_mean_what_they_mean_there() -> None:
    keys = {"arrayrecord_key": "w", "configrecord_key": "c", "weighted_by_key": "n"}

    def answer(message: Message) -> list[Message]:
        assert set(message.content) == {"w", "c"}
        reported = MetricRecord({"n": float(examples_of(message.metadata.dst_node_id))})
        return [answered(message, {"w": message.content["w"], "m": reported})]

    strategy = METHODS["FedIT"](
        scaling=1.0, fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.0, min_available_nodes=3, **keys,
        train_metrics_aggr_fn=lambda contents, key: MetricRecord({"seen": len(contents), "key": len(key)}),
    )  # fmt: skip
    grid = FakeGrid(answer)
    result = strategy.start(grid, initial(), num_rounds=1)
    assert len(grid.sent) == 2
    assert (result.train_metrics_clientapp[1]["seen"], result.train_metrics_clientapp[1]["key"]) == (2, 1)
    stock_strategy = FedAvg()
    for name in ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes",
                 "weighted_by_key", "arrayrecord_key", "configrecord_key", "train_metrics_aggr_fn",
                 "evaluate_metrics_aggr_fn"):  # fmt: skip
        assert getattr(METHODS["FloraNA"](scaling=1.0), name) == getattr(stock_strategy, name), name


def test_options_reach_the_method_and_wrong_ones_are_explained() -> None:
    def count(name: str, **options: object) -> int:
        strategy = made(name, **options)
        rounds(strategy, following)
        return max(pair.rank for pair in strategy.state.residual.modules.values())  # type: ignore[union-attr]

    assert count("FedExLora", residual_rank=1) == 1 < count("FedExLora")
    assert count("Flora", residual_rank=3) == 3
    assert count("BestRank", broadcast_rank=4) == 2
    one, other = made("FloraNA"), made("FloraNA", combine="updates", scope="model")
    rounds(one, following, 2)
    rounds(other, following, 2)
    assert bytes_of(one) != bytes_of(other)
    third = made("FloraNA", scope="component")
    rounds(third, following, 2)
    assert third.method.facts.most is not None
    assert bytes_of(third) not in (bytes_of(one), bytes_of(other))
    with pytest.raises(RecipeError, match=r"'strategy\.solver' is 'als2'"):
        made("FloraNA", solver="als2")
    with pytest.raises(RecipeError, match=r"FloraNA has no option 'solvr'\nfix: did you mean 'solver'\?"):
        made("FloraNA", solvr="als")
    with pytest.raises(RecipeError, match="give lora_alpha or scaling"):
        METHODS["FloraNA"]()
    with pytest.raises(RecipeError, match="outlier_factor is 1"):
        made("FedIT", outlier_factor=1)
    with pytest.raises(RecipeError, match="energy is 2"):
        made("Florist", energy=2.0)


def test_arrays_that_somebody_else_put_in_are_taken_or_refused() -> None:
    """Flower's wrappers (differential privacy) change the arrays between rounds."""
    grid = FakeGrid(following)
    for name in ("FloraNA", "Oracle"):
        strategy = made(name)
        rounds(strategy, following)
        other = {key: tensor + 1 for key, tensor in initial().to_torch_state_dict().items()}
        config = ConfigRecord({})
        if name == "Oracle":
            with pytest.raises(RecipeError, match="round 2 was given other arrays"):
                strategy.configure_train(2, ArrayRecord(other), config, grid)
            continue
        messages = list(strategy.configure_train(2, ArrayRecord(other), config, grid))
        sent = messages[0].content["arrays"].to_torch_state_dict()
        assert all(torch.equal(sent[key], tensor) for key, tensor in other.items())
        assert strategy.state is not None
        assert strategy.state.round == 1


def test_initial_arrays_that_are_no_adapter_are_refused() -> None:
    tensors = initial().to_torch_state_dict()
    for change, why in (
        (lambda t: {"head": torch.ones(2)}, "no LoRA factors"),
        (
            lambda t: t | {peft_name("A/layer.1.q"): torch.ones(3, 5), peft_name("B/layer.1.q"): torch.ones(8, 3)},
            "heterogeneous ranks",
        ),
        (lambda t: t | {"q.lora_magnitude_vector": torch.ones(2)}, "no rule for the tensor"),
        (lambda t: t | {peft_name("extra/head.weight"): torch.full((3, 4), math.nan)}, "12 values that are not finite"),
    ):
        with pytest.raises((InputError, RecipeError), match=why):
            made("FloraNA").start(FakeGrid(following), ArrayRecord(change(dict(tensors))), num_rounds=1)


def loaded_by(statement: str, missing: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{missing}\n{statement}\nprint(*sorted(m.split('.')[0] for m in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_package_is_lazy_and_says_which_extra_is_missing() -> None:
    names = set(loaded_by("import florana.flower; dir(florana.flower)").stdout.split())
    assert "florana" in names
    assert not {"flwr", "torch", "numpy"} & names
    hidden = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'flwr' else find(n)"
    done = loaded_by("from florana.flower import FloraNA", hidden)
    assert done.returncode != 0
    assert "pip install 'florana[flower]'" in done.stderr
    assert all(getattr(florana.flower, name).__name__ == name for name in florana.flower.__all__)
    with pytest.raises(AttributeError):
        _ = florana.flower.nothing
    assert RecordDict({"metrics": metrics(3)})  # the fakes speak Flower's own types
