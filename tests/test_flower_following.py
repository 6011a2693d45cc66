"""The two calls of a client: what the server sent is in the model, what comes up is what the method asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("flwr", reason="the extra florana[flower] is not installed")

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from florana.errors import InputError
from florana.flower import LoraStrategy, pack, receive, reply, unpack
from florana.flower.dropin.client_helpers import KEPT
from florana.flower.dropin.replies import RESIDUAL
from tests.flower_fake import FakeGrid, examples_of
from tests.flower_methods import METHODS

pytestmark = pytest.mark.usefixtures("launched")


class Net(torch.nn.Module):
    """A non-square layer that is adapted, a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(5, 7)
        self.head = torch.nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.q(x))


def model(rank: int = 2) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Net(), LoraConfig(r=rank, lora_alpha=3, target_modules=["q"], modules_to_save=["head"]))


def context() -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


class Sites:
    """One model and one context per node; training is noise on what may be trained."""

    def __init__(self) -> None:
        self.models: dict[int, PeftModel] = {}
        self.contexts: dict[int, Context] = {}
        self.trained: list[set[str]] = []

    def __call__(self, message: Message) -> list[Message]:
        node, round_ = message.metadata.dst_node_id, int(message.metadata.group_id)
        own, state = self.models.setdefault(node, model()), self.contexts.setdefault(node, context())
        receive(own, message, state)
        generator = torch.Generator().manual_seed(node * 100 + round_)
        with torch.no_grad():
            for parameter in own.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        self.trained.append({letter for letter in "AB" for n, p in own.named_parameters()
                             if f".lora_{letter}." in n and p.requires_grad})  # fmt: skip
        return [reply(own, message, state, {"num-examples": examples_of(node), "train_loss": 1.0})]


def run(
    name: str, sites: Callable[[Message], list[Message]], rounds: int, **options: object
) -> tuple[LoraStrategy, FakeGrid]:
    strategy = METHODS[name](lora_alpha=3, min_train_nodes=4, fraction_evaluate=0.0, **options)
    grid = FakeGrid(sites)
    strategy.start(grid, ArrayRecord(get_peft_model_state_dict(model())), num_rounds=rounds)
    return strategy, grid


@pytest.mark.parametrize("name", METHODS)
def test_a_client_of_two_calls_goes_with_every_method(name: str) -> None:
    """Two rounds without a refusal; it trains what the method says; its model after `receive` is the server's, by a
    dense float64 sum."""
    sites = Sites()
    strategy, grid = run(name, sites, 2)
    assert strategy.refused == {}
    assert strategy.state is not None
    assert strategy.state.round == 2
    expected = {"FfaLora": [{"B"}] * 2, "FedSVD": [{"B"}] * 2, "RoLora": [{"B"}, {"A"}]}.get(name, [{"A", "B"}] * 2)
    assert sites.trained[::4] == expected
    if name == "FedSALora":
        return
    messages = list(strategy.configure_train(3, strategy._current, grid.sent[-1].content["config"], grid))
    own = sites.models[messages[0].metadata.dst_node_id]
    receive(own, messages[0], context())
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(9))
    plain = own.base_model.model.q.base_layer
    pair = strategy.adapter.modules["q"]
    weight = plain.weight.double() + pair.scaling * pair.B.double() @ pair.A.double()
    inner = x.double() @ weight.T + plain.bias.double()
    head = strategy.adapter.extra
    target = inner @ head["head.weight"].double().T + head["head.bias"].double()
    assert torch.allclose(own(x).double(), target, atol=1e-5)
    assert (RESIDUAL in messages[0].content) == (strategy.state.residual is not None)


def test_a_client_that_is_sent_fewer_terms_trains_them_and_can_get_more_again() -> None:
    """FLoRIST at two thresholds: one term in round 2, then both again; the model's own rank is checked."""
    sites, key = Sites(), "base_model.model.q.lora_A.weight"
    strategy, grid = run("Florist", sites, 2, energy=0.3)
    assert strategy.refused == {}
    assert [m.content["arrays"][key].shape[0] for m in grid.sent[::4]] == [2, 1]
    assert strategy.state is not None
    assert strategy.state.adapter.modules["q"].rank == 1
    one = next(m for m in grid.sent if m.metadata.group_id == "2")
    node = one.metadata.dst_node_id
    own = sites.models[node]
    assert own.base_model.model.q.lora_B["default"].weight.shape == (7, 1)
    assert own(torch.ones(2, 5)).shape == (2, 3)
    receive(own, grid.sent[0], context())
    assert own.base_model.model.q.lora_B["default"].weight.shape == (7, 2)
    with pytest.raises(InputError, match="name this client's rank"):
        receive(model(3), one, context())
    assert unpack(reply(own, grid.sent[0], context(), {"num-examples": 1}).content["arrays"])[key].shape == (2, 5)


def test_what_a_client_keeps_comes_back_and_never_leaves() -> None:
    sites = Sites()
    _, grid = run("FedSALora", sites, 1)
    key = "base_model.model.q.lora_B.weight"
    kept = {node: unpack(state.state[KEPT])[key] for node, state in sites.contexts.items()}
    assert all(bool(B.any()) for B in kept.values())
    assert not torch.equal(kept[11], kept[7])
    message = next(m for m in grid.sent if m.metadata.dst_node_id == 7)
    receive(sites.models[7], message, sites.contexts[7])
    assert torch.equal(sites.models[7].base_model.model.q.lora_B["default"].weight, kept[7])
    answer = reply(sites.models[7], message, sites.contexts[7], {"num-examples": 1})
    assert set(answer.content["arrays"]) == {
        "base_model.model.q.lora_A.weight", "base_model.model.head.weight", "base_model.model.head.bias"
    }  # fmt: skip


def test_a_frozen_part_is_replaced_and_taken_off() -> None:
    sites = Sites()
    _, grid = run("Oracle", sites, 2)
    first, second = (next(m for m in grid.sent if m.metadata.group_id == str(n)) for n in (1, 2))
    own, x = model(), torch.ones(1, 5)
    receive(own, first, context())
    before = own(x)
    receive(own, second, context())
    receive(own, second, context())
    once = own(x)
    receive(own, first, context())
    assert torch.equal(own(x), before)
    receive(own, second, context())
    assert torch.equal(own(x), once)
    assert not torch.equal(once, before)


def test_a_bfloat16_model_keeps_its_bits() -> None:
    own = model().to(torch.bfloat16)
    sent = pack(get_peft_model_state_dict(own))
    message = Message(RecordDict({"arrays": sent}), 5, "train")
    receive(own, message, context())
    back = reply(own, message, context(), {"num-examples": 3}).content["arrays"]
    assert {key: array.data for key, array in back.items()} == {key: array.data for key, array in sent.items()}
    assert all(array.dtype == "bfloat16" for array in back.values())


def test_a_message_that_does_not_fit_the_model_is_explained() -> None:
    good = get_peft_model_state_dict(model())
    key = "base_model.model.q.lora_A.weight"

    def sent(tensors: dict[str, torch.Tensor], residual: dict[str, torch.Tensor] | None = None) -> Message:
        records = {"arrays": pack(tensors)} | ({RESIDUAL: pack(residual)} if residual else {})
        return Message(RecordDict(records), 5, "train")

    missing = {name: tensor for name, tensor in good.items() if not name.endswith("head.bias")}
    for message, why in (
        (
            sent(dict(get_peft_model_state_dict(model(3)))),
            rf"'{key}' is \(3, 5\) at the server and \(2, 5\) in the mod",
        ),
        (sent(good | {"base_model.model.v": torch.ones(2)}), "the model has no tensor 'base_model.model.v'"),
        (sent(missing), "the server sent no tensor 'base_model.model.head.bias'"),
        (sent(good, {"A/v": torch.ones(1, 5), "B/v": torch.ones(7, 1)}), "the model has no module 'v'"),
        (Message(RecordDict({}), 5, "train"), "brings 0 ArrayRecords"),
    ):
        with pytest.raises(InputError, match=why):
            receive(model(), message, context())
