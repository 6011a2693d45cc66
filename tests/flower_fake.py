"""A Flower federation without Flower's processes: a Grid that hands each message to a function, and fake clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from florana.flower.dropin.arrays import pack, unpack
from florana.flower.dropin.names import peft_name
from florana.flower.dropin.replies import FLORANA, RESIDUAL, digest_of
from tests.federation import first_adapter

NODES = [11, 7, 5, 3]
SCALING = 1.5  # of tests.federation.first_adapter

Answer = Callable[[Message], Sequence[Message]]


def identify() -> None:
    """What Flower's launcher does before an app may make a Message."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 1


def initial() -> ArrayRecord:
    """`first_adapter` as a PEFT state dict of a stock app."""
    return ArrayRecord({peft_name(name): tensor for name, tensor in first_adapter().tensors().items()})


@dataclass
class FakeGrid(Grid):
    """Nodes that answer at once, in reversed order if asked; keeps all messages that went out."""

    answer: Answer
    nodes: Sequence[int] = tuple(NODES)
    backwards: bool = False
    sent: list[Message] = field(default_factory=list)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        went = list(messages)
        self.sent += went
        replies = [reply for message in went for reply in self.answer(message)]
        return list(reversed(replies)) if self.backwards else replies

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def noise(name: str, like: Tensor, node: int, round_: int) -> Tensor:
    """What training changes in one tensor: seeded by the tensor's name, the node and the round."""
    seed = sum(name.encode()) * 10_007 + node * 101 + round_
    return (0.1 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))).to(like.dtype)


def examples_of(node: int) -> int:
    return 10 + 3 * node


def trained(tensors: dict[str, Tensor], node: int, round_: int, trains: Iterable[str]) -> dict[str, Tensor]:
    """Noise on the factors that are trained, and on the head; the others as they were sent."""
    kinds = tuple(f".lora_{kind}.weight" for kind in trains)
    return {
        key: tensor + noise(key, tensor, node, round_) if key.endswith(kinds) or ".lora_" not in key else tensor
        for key, tensor in tensors.items()
    }


def stock(message: Message) -> list[Message]:
    """A client that knows nothing of florana: trains all, sends all."""
    round_, node = int(message.content["config"]["server-round"]), message.metadata.dst_node_id
    tensors = message.content["arrays"].to_torch_state_dict()
    answer = trained(tensors, node, round_, "AB")
    return [answered(message, {"arrays": ArrayRecord(answer), "metrics": metrics(node)})]


def following(message: Message) -> list[Message]:
    """A client that does what `florana.flower.receive` and `reply` do, without a model."""
    round_, node = int(message.content["config"]["server-round"]), message.metadata.dst_node_id
    said = message.content.config_records.get(FLORANA, ConfigRecord({"trains": ["A", "B"], "returns": ["A", "B"]}))
    tensors = trained(unpack(message.content["arrays"]), node, round_, said["trains"])
    kinds = tuple(f".lora_{kind}.weight" for kind in said["returns"])
    up = {key: tensor for key, tensor in tensors.items() if key.endswith(kinds) or ".lora_" not in key}
    content = {"arrays": pack(up), "metrics": metrics(node)}
    if FLORANA in message.content:
        content[FLORANA] = ConfigRecord({"residual": digest_of(message.content.array_records.get(RESIDUAL))})
    return [answered(message, content)]


def metrics(node: int) -> MetricRecord:
    return MetricRecord({"train_loss": 0.5 + node, "num-examples": examples_of(node)})


def answered(message: Message, content: dict[str, object]) -> Message:
    return Message(RecordDict(content), reply_to=message)


def failed(message: Message) -> list[Message]:
    return [Message(Error(code=2, reason="out of memory"), reply_to=message)]
