"""How much each accepted update counts: its rows, the cap on one client, and the robust rule where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from florana.errors import FederationError, InputError
from florana.lora.factors import Update
from florana.robust.cap import capped, usual, usual_under_a_rule
from florana.robust.changes import grams
from florana.robust.shrink import drawn_back
from florana.robust.verdict import Rule
from florana.strategy.base import Payload

Shares = Callable[[Sequence[Update]], Mapping[str, float]]
"""Updates -> client -> weight, see `by_examples` and `uniformly`."""


@dataclass(frozen=True)
class Weighing:
    """The fixed part of it.

    Args:
        shares: `by_examples` or `uniformly`.
        most: the largest share of one client; None for `robust.cap.usual`, or `usual_under_a_rule`.
        rule: the robust rule; None for none.
        name: how the notes call the rule.
    """

    shares: Shares
    most: float | None = None
    rule: Rule | None = None
    name: str = "none"


@dataclass(frozen=True, eq=False)
class Weighed:
    """What goes to the strategy.

    Args:
        updates: those that count, in the order they were given; drawn back where the rule says so.
        weights: client -> weight, of those updates.
        notes: what the journal says of it.
    """

    updates: Sequence[Update]
    weights: Mapping[str, float]
    notes: Mapping[str, object] = field(default_factory=dict)


def by_examples(updates: Sequence[Update]) -> dict[str, float]:
    """w_u = n_u / sum n over the clients that took part."""
    total = sum(update.examples for update in updates)
    return {update.client: update.examples / total for update in updates}


def uniformly(updates: Sequence[Update]) -> dict[str, float]:
    """w_u = 1 / U, as in the FLoRA-NA paper's formula."""
    return {update.client: 1 / len(updates) for update in updates}


def weigh(updates: Sequence[Update], sent: Mapping[str, Payload], how: Weighing) -> Weighed:
    """The updates with their weights.

    Args:
        updates: the round's usable updates.
        sent: client -> what it was sent.
        how: shares, cap and robust rule.

    Raises:
        FederationError: fewer updates than the rule needs.
    """
    asked = how.shares(updates)
    usually = usual if how.rule is None else usual_under_a_rule
    weights = capped(asked, usually(len(updates)) if how.most is None else how.most)
    held = sorted(client for client, weight in weights.items() if weight < asked[client])
    notes: dict[str, object] = {"capped": {client: asked[client] for client in held}} if held else {}
    if how.rule is None:
        return Weighed(updates, weights, notes)
    pairs = [(update.adapter, sent[update.client].adapter) for update in updates]
    travels = {kind for update in updates for kind in sent[update.client].work.up}
    try:
        verdict = how.rule(grams(pairs, travels), [weights[update.client] for update in updates])
    except InputError as error:
        raise FederationError(f"the robust rule cannot hold: {error.what}", why=error.why, fix=error.fix) from None
    kept, after, counted = [], {}, {}
    for update, pair, weight, share in zip(updates, pairs, verdict.weights, verdict.shares, strict=True):
        counted[update.client] = weight / weights[update.client] * min(share.values(), default=1.0)
        if weight > 0:
            kept.append(replace(update, adapter=drawn_back(pair, share)))
            after[update.client] = weight
    return Weighed(kept, after, {**notes, "robust": {"rule": how.name, "counts": counted}})
