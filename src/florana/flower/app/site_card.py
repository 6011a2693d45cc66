"""What a site says of itself at registration: checked whole before anything believes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from florana.adapters.adapter_folder import AdapterCard

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**62, strict=True)]
Word = Annotated[str, Field(max_length=200)]
"""What a site says of itself stands in the server's own files, so it is short."""


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Holds(_Said):
    """How many rows, and of which class; never the rows. `train` is None where secure sums hide it."""

    train: Count | None
    test: Count
    per_label: Annotated[list[Count], Field(max_length=100_000)] | None = None


class Common(_Said):
    """What must be the same at every site, and at a server that has the base model.

    Args:
        base: sha256 of the base model's parameters.
        start: sha256 of the adapter before the first round.
        labels: the classes.
        scalings: module -> LoRA scaling of that adapter.
        base_parameters: how many parameters the base model has.
        adapter: what the exported folder will say, without the base model's name.
    """

    base: Word
    start: Word
    labels: list[str]
    scalings: dict[str, Positive]
    base_parameters: Count
    adapter: AdapterCard


class Card(_Said):
    """One site.

    Args:
        client: its name.
        florana: the version of florana.
        torch: the version of torch.
        threads: how many threads it computes with.
        instructions: what kind of processor it computes on.
        agreed: its recipe, as `site.agreed` gives it.
        holds: its rows, counted.
        common: see `Common`.
    """

    client: Word
    florana: Word
    torch: Word
    threads: Annotated[int, Field(ge=1, strict=True)]
    instructions: Word
    agreed: dict[str, Any]
    holds: Holds
    common: Common

    @property
    def computes(self) -> dict[str, Any]:
        """All beside the data on which the last bits of its answers depend."""
        return self.model_dump(include={"threads", "instructions", "torch"})

    def introduced(self, began: Mapping[str, Any] | None) -> str:
        """Who joins, in words; `began` is what it computed with when the run began, where it took part then."""
        rows = "its rows hidden" if self.holds.train is None else f"{self.holds.train} rows"
        words = f"{rows}, threads {self.threads}"
        if began is None or began == self.computes:
            return words
        now = self.computes
        changed = [f"{key} {began.get(key)} -> {value}" for key, value in now.items() if began.get(key) != value]
        return f"{words} (since the run began: {', '.join(changed)}: its last bits may differ)"


NAMES = {
    "base": "base model",
    "start": "adapter to start from",
    "labels": "classes",
    "scalings": "LoRA scalings",
    "base_parameters": "size of the base model",
    "adapter": "adapter configuration",
}


def card_from(fields: object) -> Card | str:
    """The card, or what is wrong with it.

    Examples:
        >>> card_from({"client": 3})
        'does not introduce itself as florana does (another version of it?): client: Input should be a valid string'
    """
    try:
        return Card.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        return f"does not introduce itself as florana does (another version of it?): {where}: {first['msg']}"


def digest(card: Card) -> str:
    """sha256 of a card: by it a site sees whether it still is what the server takes it for."""
    return hashlib.sha256(json.dumps(card.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def difference(own: Common, others: Common, whose: str) -> str:
    """What the first has otherwise than the second, in words; empty where they are the same."""
    for key, what in NAMES.items():
        mine, theirs = getattr(own, key), getattr(others, key)
        if mine != theirs:
            return f"differs from {whose} in its {what} ({str(mine)[:12]} and {str(theirs)[:12]})"
    return ""


def most_common(cards: Sequence[Card]) -> Card | None:
    """One of the cards whose `common` most sites have; of equally many, that of the client first by name."""
    same = {card.client: card.common.model_dump_json() for card in cards}
    counts = list(same.values())
    return min(cards, key=lambda card: (-counts.count(same[card.client]), card.client), default=None)
