"""What came back in a round of a Flower app: every reply through florana's gate, the usable ones in one order."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from florana.displayable import log
from florana.errors import InputError
from florana.federation.gate import Expected, RejectedUpdate, check_size, oversized, validate
from florana.federation.messages import Reply
from florana.flower.dropin.arrays import size_of, tensor_of
from florana.flower.dropin.names import Names
from florana.lora.factors import Update, kind_of
from florana.strategy.base import Payload

FLORANA = "florana"
"""Key of the ConfigRecord in which server and client say what plain arrays do not."""

RESIDUAL = "florana-residual"
"""Key of the ArrayRecord with the frozen part that goes beside the adapter."""


@dataclass(frozen=True, eq=False)
class Rules:
    """What a proper reply looks like beyond `gate.Expected`.

    Args:
        names: the record's keys and florana's names.
        weighted_by: the metric that counts the training examples.
        follows: the digest of the frozen part that a reply must acknowledge; None where the method sends none.
        outlier_factor: see `gate.oversized`.
    """

    names: Names
    weighted_by: str
    follows: Mapping[str, str] | None
    outlier_factor: float


@dataclass(frozen=True, eq=False)
class Collected:
    """The usable updates and what each brought along, in one order; client -> why, for the others.

    Args:
        updates: the usable updates.
        contents: what each of them brought, in the same order.
        refused: node id in decimal -> why its reply was left out.
    """

    updates: Sequence[Update]
    contents: Sequence[RecordDict]
    refused: Mapping[str, str]


def collect(replies: Iterable[Message], expected: Expected, rules: Rules) -> Collected:
    """Let the replies through the gate. Nothing a client sends ends the round for the others.

    The order of the usable ones is that of their own content, so it depends neither on who was faster nor on node ids,
    which Flower draws anew in every simulation: the same updates give the same bytes.

    Args:
        replies: the round's messages; untrusted.
        expected: what was asked, by node id in decimal.
        rules: how names, types and counts are read.
    """
    updates: dict[str, Update] = {}
    contents: dict[str, RecordDict] = {}
    refused: dict[str, str] = {}
    for message in replies:
        client = str(message.metadata.src_node_id)
        try:
            updates[client] = _validated(client, message, expected, rules, updates)
            contents[client] = message.content
        except RejectedUpdate as reason:
            refused[client] = str(reason)
    for client, why in oversized(list(updates.values()), expected.clients, rules.outlier_factor).items():
        refused[client] = why
        del updates[client]
    for client in expected.clients.keys() - updates.keys() - refused.keys():
        refused[client] = "did not answer"
    for client, why in sorted(refused.items()):
        log.warning("round %d: node %s is left out: %s", expected.round, client, why)
    order = sorted(updates, key=lambda client: fingerprint(updates[client]))
    return Collected([updates[c] for c in order], [contents[c] for c in order], dict(sorted(refused.items())))


def _validated(client: str, message: Message, expected: Expected, rules: Rules, seen: Mapping[str, Update]) -> Update:
    if message.has_error():
        raise RejectedUpdate(f"failed: {str(message.error.reason)[:300]}")
    content = message.content
    arrays, metrics = list(content.array_records.values()), list(content.metric_records.values())
    if len(arrays) != 1 or len(metrics) != 1:
        raise RejectedUpdate(
            f"brings {len(arrays)} ArrayRecords and {len(metrics)} MetricRecords; one of each is expected"
        )
    if rules.follows is not None and client in expected.clients:
        _check_follows(content, rules.follows[client])
    reply = Reply(
        client=client,
        round=_round_of(message.metadata.group_id),
        examples=_examples(metrics[0].get(rules.weighted_by)),
        metrics=_flat(metrics[0], without=rules.weighted_by),
        payload=b"",
        seconds=0.0,
    )
    return validate(reply, expected, seen.keys(), functools.partial(_tensors, arrays[0], rules.names))


def _round_of(group: str) -> int:
    """Flower copies the group of a request into its reply; the strategy puts the round there."""
    return int(group) if group.isdecimal() and group.isascii() and len(group) < 10 else -1


def _examples(value: object) -> int:
    """The count as the gate wants it; a whole number may come as a float, and nonsense is left for the gate to name."""
    if value is None:
        raise RejectedUpdate("does not report its training examples")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value  # type: ignore[return-value]  # the gate looks at the type


def _flat(metrics: MetricRecord, without: str) -> dict[str, float]:
    """Every number a client measured, one by one; an integer beyond floats is no finite metric."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if name == without:
            continue
        for place, number in enumerate(value if isinstance(value, list) else [value]):
            try:
                flat[f"{name[:80]}[{place}]" if isinstance(value, list) else name[:80]] = float(number)
            except OverflowError:
                raise RejectedUpdate(f"the metric '{name[:80]}' is not finite") from None
    return flat


def _tensors(record: ArrayRecord, names: Names, sent: Payload) -> dict[str, Tensor]:
    """The tensors that come up, by florana's names. What stays fixed may come along, if it is what was sent."""
    before = sent.adapter.tensors()
    check_size(size_of(record), before)
    tensors: dict[str, Tensor] = {}
    for key, array in record.items():
        name = names.canonical.get(key)
        if name is None:
            raise RejectedUpdate(f"brings the foreign tensor '{key[:80]}'")
        try:
            tensor = tensor_of(key, array)
        except InputError as error:
            raise RejectedUpdate(str(error).replace("\n", "; ")) from None
        if kind_of(name) in sent.work.up or kind_of(name) == "extra":
            tensors[name] = tensor
        elif not (tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])):
            raise RejectedUpdate(
                f"changed '{key[:80]}', which this method keeps fixed or with the client in this round; the client "
                "must use florana.flower.receive and florana.flower.reply"
            )
    return tensors


def _check_follows(content: RecordDict, digest: str) -> None:
    said = content.config_records.get(FLORANA, ConfigRecord()).get("residual")
    if said != digest:
        raise RejectedUpdate(
            "does not say that it added the frozen part which this method sends; the client must use "
            "florana.flower.receive and florana.flower.reply"
        )


def fingerprint(update: Update) -> tuple[bytes, int]:
    """A digest of what an update holds, and its examples: the key of the order in which updates are combined."""
    digest = hashlib.sha256()
    for name, tensor in update.adapter.tensors().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest(), update.examples


def digest_of(record: ArrayRecord | None) -> str:
    """What a client says back of the frozen part it was sent: `none`, or a digest of its arrays."""
    if record is None:
        return "none"
    digest = hashlib.sha256()
    for name in sorted(record):
        digest.update(name.encode())
        digest.update(record[name].data)
    return digest.hexdigest()


def common_metrics(contents: Sequence[RecordDict]) -> list[RecordDict]:
    """The contents with only those metrics that every reply reports in one form: the others have no common mean."""
    forms = [{name: _form(value) for name, value in _metrics_of(content).items()} for content in contents]
    shared = {name for name, form in forms[0].items() if all(other.get(name) == form for other in forms[1:])}
    left_out = sorted({name for form in forms for name in form} - shared)
    if left_out:
        log.info("metrics that not all replies report are left out of the mean: %s", ", ".join(left_out)[:300])
    result = []
    for content in contents:
        key = next(iter(content.metric_records))
        kept = MetricRecord({name: value for name, value in _metrics_of(content).items() if name in shared})
        result.append(RecordDict({**dict(content.items()), key: kept}))
    return result


def sound_metrics(replies: Iterable[Message], weighted_by: str) -> list[RecordDict]:
    """The contents of the evaluation replies that have one MetricRecord of finite numbers and a sane count."""
    sound = []
    for message in replies:
        try:
            if message.has_error():
                raise RejectedUpdate(f"failed: {str(message.error.reason)[:300]}")
            if len(message.content.metric_records) != 1:
                raise RejectedUpdate("does not bring exactly one MetricRecord")
            metrics = _metrics_of(message.content)
            numbers = {**_flat(metrics, without=weighted_by), weighted_by: _count(metrics.get(weighted_by))}
            bad = [name for name, value in numbers.items() if not math.isfinite(value)]
            if bad or numbers[weighted_by] <= 0:
                raise RejectedUpdate(f"reports {'a number that is not finite' if bad else 'no examples'}")
        except RejectedUpdate as reason:
            log.warning("evaluation: node %s is left out: %s", message.metadata.src_node_id, reason)
        else:
            sound.append(message.content)
    return sound


def _count(value: object) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


def _metrics_of(content: RecordDict) -> MetricRecord:
    return next(iter(content.metric_records.values()))


def _form(value: object) -> int:
    """The length of a list; -1 for a number."""
    return len(value) if isinstance(value, list) else -1
