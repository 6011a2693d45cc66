"""A florana method behind Flower's Strategy interface: what a user's own Flower app puts in the place of FedAvg.

Flower's loop, sampling and messages stay. Replies pass the gate, `step` combines them, the object holds the `State`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from florana.aggregate.error import measure
from florana.aggregate.stack import combined
from florana.displayable import log
from florana.errors import FloranaError, RecipeError, nearest
from florana.federation.gate import MAX_CHANGE, Expected
from florana.federation.weighting import Weighing, by_examples, weigh
from florana.flower.dropin import replies as answers
from florana.flower.dropin.arrays import pack, unpack
from florana.flower.dropin.names import Names, names_of, scaling_rule
from florana.flower.dropin.replies import FLORANA, RESIDUAL, Collected, Rules, collect
from florana.lora.factors import Adapter, Contribution
from florana.robust.verdict import Rule
from florana.strategy import facts
from florana.strategy.base import MARK, PAIR, Outcome, Payload, State, Strategy, rank_of

MetricsRule = Callable[[list[RecordDict], str], MetricRecord]
_WITH_RESIDUAL = (facts.PAIR_AND_RESIDUAL, facts.A_AND_RESIDUAL, facts.RESIDUAL)


class _FedAvgOptions(TypedDict, total=False):
    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: MetricsRule | None
    evaluate_metrics_aggr_fn: MetricsRule | None


class Common(_FedAvgOptions, total=False):
    """The options that every strategy of this package has beside its own and FedAvg's.

    LoRA's scaling does not travel in a PEFT state dict: give `lora_alpha` or `scaling`. Frozen parts depend on it.

    Args:
        lora_alpha: of the PEFT configuration.
        rslora: of the PEFT configuration.
        scaling: instead of `lora_alpha`: one number, or a table from modules to numbers.
        client_ranks: node id -> the rank of its model, where clients have heterogeneous ranks.
        outlier_factor: an update whose change is more than so many times the round's median change is refused.
        max_weight: the most that one node weighs, as a share of the round; None for `florana.robust.cap.usual`.
        robust: a rule that stands before the method, see `florana.robust.verdict`.
    """

    lora_alpha: float | None
    rslora: bool
    scaling: float | Mapping[str, float] | None
    client_ranks: Mapping[int, int] | Callable[[int], int] | None
    outlier_factor: float
    max_weight: float | None
    robust: Rule | None


_OWN = ("lora_alpha", "rslora", "scaling", "client_ranks", "outlier_factor", "max_weight", "robust")


@dataclass(frozen=True, eq=False)
class _Asked:
    """What went out in a round: node id in decimal -> its payload, and the digest of its frozen part."""

    round: int
    payloads: Mapping[str, Payload]
    digests: Mapping[str, str]


_NOBODY = _Asked(0, {}, {})


class LoraStrategy(FedAvg):
    """Any florana `Strategy` value as a Flower strategy; the named classes of this package are this one.

    `aggregate_train` gives the next adapter under the names of the initial arrays and, beside the clients' own
    metrics, `florana-error` and `florana-optimum` (relative, see `florana.measure`), `florana-accepted` and
    `florana-refused`. A frozen part and the LoRA factors go out joined, as one adapter of the added rank. Nothing
    usable gives (None, None): Flower then keeps the arrays of the round before.

    Attributes:
        state: the method's state after the last round, None before the first.
        refused: node id in decimal -> why its last reply was left out.

    Raises:
        RecipeError: options that do not go together, or a method that cannot hold in a plain Flower app.
    """

    def __init__(self, method: Strategy, **options: Unpack[Common]) -> None:
        for name in sorted(options.keys() - Common.__annotations__.keys()):
            own = inspect.signature(type(self)).parameters.keys() - {"method", "common", "options"}
            raise RecipeError(
                f"{type(self).__name__} has no option '{name}'", fix=nearest(name, own | Common.__annotations__.keys())
            )
        given: dict[str, Any] = {name: value for name, value in options.items() if name not in _OWN}
        super().__init__(**given)
        if method.begin != "lora" or method.facts.up is facts.CORE or method.sums is not None:
            asks = "it asks each client twice in a round, which Flower's strategies do not"
            begins = "it starts from the base weights, or trains matrices that a PEFT model does not have"
            raise RecipeError(
                f"the method '{method.name}' cannot be dropped into a Flower app",
                why=begins if method.sums is None else asks,
                fix="use florana's own app: florana flower export",
            )
        self.method = method
        self._scaling_of = scaling_rule(options.get("lora_alpha"), options.get("rslora", False), options.get("scaling"))
        self._ranks = options.get("client_ranks")
        if self._ranks is not None and method.cut is None:
            raise RecipeError(f"client_ranks does not go with '{method.name}'", why=method.facts.mixed_ranks)
        self._outlier_factor = options.get("outlier_factor", MAX_CHANGE)
        if not self._outlier_factor > 1:
            raise RecipeError(f"outlier_factor is {self._outlier_factor}, not above 1")
        most = options.get("max_weight")
        if most is not None and not 0 < most <= 1:
            raise RecipeError(f"max_weight is {most}, not above 0 and at most 1")
        rule = options.get("robust")
        if rule is not None and method.facts.robust.startswith("no"):
            raise RecipeError(f"a robust rule does not go with '{method.name}'", why=method.facts.robust[4:])
        self._weighing = Weighing(by_examples, most, rule)
        self._rows: dict[str, int] = {}  # what each node said in its first round
        self._residual = method.facts.down in _WITH_RESIDUAL
        self.state: State | None = None
        self.refused: Mapping[str, str] = {}
        self._names = Names({})
        self._current: ArrayRecord | None = None  # the record that stands for `state`
        self._asked = _NOBODY
        self._rank = 0  # of the initial arrays: a broadcast may have fewer components

    @property
    def adapter(self) -> Adapter:
        """The global adapter, its frozen part joined in: what `florana.write_adapter` saves for PEFT to load."""
        if self.state is None:
            raise RecipeError("there is no adapter before the first round")
        return combined(self.state.adapter, self.state.residual)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's sampling; to each node the method's broadcast, cut to its rank."""
        state = self._take(server_round, arrays)
        chosen = list(super().configure_train(server_round, arrays, config, grid))
        payloads = {str(m.metadata.dst_node_id): self._payload(state, m.metadata.dst_node_id) for m in chosen}
        messages, digests = self._addressed(chosen, payloads, str(server_round))
        self._asked = _Asked(server_round, payloads, digests)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The replies through the gate and the method's step; (None, None) where no usable reply is left."""
        asked, self._asked = self._asked, _NOBODY  # what was asked is answered once
        payloads = asked.payloads if asked.round == server_round else {}
        rules = Rules(
            self._names, self.weighted_by_key, asked.digests if self._residual else None, self._outlier_factor
        )
        found = collect(replies, Expected(server_round, payloads, self._rows), rules)
        self.refused = found.refused
        if self.state is None or not found.updates:
            return None, None
        self._rows = {**{u.client: u.examples for u in found.updates}, **self._rows}
        try:
            weighed = weigh(found.updates, payloads, self._weighing)
            weights = weighed.weights
            parts = [
                Contribution(u.client, u.adapter, weights[u.client], payloads[u.client].residual)
                for u in weighed.updates
            ]
            outcome = self.method.step(self.state, parts)
            _require_finite(outcome)
            metrics = self._metrics(found, parts, outcome)
        except (FloranaError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            log.error("round %d: the step failed, the adapter stays as it was: %s", server_round, error)
            return None, None
        self.state = outcome.state
        self._current = pack(self._names.record_names(self.adapter))
        return self._current, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As `configure_train`: the LoRA factors, and the frozen part where there is one."""
        chosen = list(super().configure_evaluate(server_round, arrays, config, grid))
        if not chosen:
            return []
        state = self._take(server_round, arrays)
        payloads = {str(m.metadata.dst_node_id): self._payload(state, m.metadata.dst_node_id) for m in chosen}
        return self._addressed(chosen, payloads, str(server_round))[0]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean of what the sound replies report in common; None where there is none."""
        del server_round
        contents = answers.sound_metrics(replies, self.weighted_by_key)
        return (
            self.evaluate_metrics_aggr_fn(answers.common_metrics(contents), self.weighted_by_key) if contents else None
        )

    def _take(self, server_round: int, arrays: ArrayRecord) -> State:
        """The state that `arrays` stand for: the last round's, a new one, or the last one with an adapter put in."""
        if self.state is not None and arrays is self._current:
            return self.state
        names = names_of(arrays)
        adapter = names.adapter(unpack(arrays), self._scaling_of)
        if len({pair.rank for pair in adapter.modules.values()}) > 1:
            raise RecipeError(
                "the initial arrays have heterogeneous ranks", why="florana's methods have one rank per client"
            )
        if self.state is None or server_round == 1:
            begun, self._rank = self.method.init(adapter), rank_of(adapter)
        elif self.state.residual is not None or _remembers(self.state) or names != self._names:
            raise RecipeError(
                f"round {server_round} was given other arrays than the round before made",
                why=f"'{self.method.name}' keeps more than the adapter, or the tensors have other names",
                fix="do not change the arrays between rounds",
            )
        else:
            begun = replace(self.state, adapter=adapter)
        self.state, self._names, self._current = begun, names, arrays
        return begun

    def _own(self, node: int) -> int:
        """The rank of a node's model, which it may be sent fewer components than."""
        if self._ranks is None:
            return self._rank
        rank: object = self._ranks(node) if callable(self._ranks) else self._ranks.get(node)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= self._rank:
            raise RecipeError(f"client_ranks gives node {node} the rank {rank!r}, not 1 to {self._rank}")
        return rank

    def _payload(self, state: State, node: int) -> Payload:
        whole = self.method.brief(state, str(node))
        if self._ranks is None or self.method.cut is None:
            return whole
        rank = self._own(node)
        scalings = {self._scaling_of(module, rank) for module in state.adapter.modules}
        if len(scalings) > 1:
            raise RecipeError("client_ranks needs one scaling for all modules of a client")
        return self.method.cut(whole, rank, scalings.pop())

    def _addressed(
        self, messages: Iterable[Message], payloads: Mapping[str, Payload], group: str
    ) -> tuple[list[Message], dict[str, str]]:
        """The messages with each node's own content; nodes that get the same tensors get the same records."""
        packed: dict[tuple[int, int], tuple[ArrayRecord, ArrayRecord | None]] = {}
        result, digests = [], {}
        for message in messages:
            node = message.metadata.dst_node_id
            payload = payloads[str(node)]
            key = (id(payload.adapter), id(payload.residual))
            if key not in packed:
                frozen = ArrayRecord({}) if payload.residual is None else pack(payload.residual.tensors())
                packed[key] = (pack(self._names.record_names(payload.adapter)), frozen if payload.residual else None)
            arrays, residual = packed[key]
            digests[str(node)] = answers.digest_of(residual)
            content = RecordDict(dict(message.content.items()))
            content[self.arrayrecord_key] = arrays
            if self._residual or payload.work != PAIR:
                content[FLORANA] = ConfigRecord(
                    {"trains": sorted(payload.work.trains), "returns": sorted(payload.work.up), "rank": self._own(node)}
                )
            if residual is not None:
                content[RESIDUAL] = residual
            kind = message.metadata.message_type
            result.append(Message(content, dst_node_id=node, message_type=kind, group_id=group))
        return result, digests

    def _metrics(self, found: Collected, parts: list[Contribution], outcome: Outcome) -> MetricRecord:
        metrics = self.train_metrics_aggr_fn(answers.common_metrics(found.contents), self.weighted_by_key)
        metrics["florana-accepted"], metrics["florana-refused"] = len(found.updates), len(found.refused)
        if self.method.facts.one_model:
            error = measure(parts, outcome.state.adapter, outcome.state.residual)
            metrics["florana-error"], metrics["florana-optimum"] = error.error, error.optimum
        return metrics


def _remembers(state: State) -> bool:
    """Whether the method keeps something that belongs to the adapter it sent."""
    return any(not name.startswith(MARK) for name in state.memory)


def _require_finite(outcome: Outcome) -> None:
    for adapter in (outcome.state.adapter, outcome.state.residual):
        for name, tensor in (adapter.tensors() if adapter is not None else {}).items():
            if not bool(torch.isfinite(tensor).all()):
                raise FloranaError(f"the aggregated tensor '{name}' is not finite")
