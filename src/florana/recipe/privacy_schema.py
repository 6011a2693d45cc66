"""The recipe's [privacy]: what the server may see of a client."""

from __future__ import annotations

from pydantic import Field, model_validator

from florana.recipe.data_schema import Section


class Privacy(Section):
    """What the server may see of a client; docs/privacy.md says what each setting protects, and what not."""

    secure_aggregation: bool = False
    """The server learns sums over clients alone, under masks (Bonawitz et al. 2017)."""
    min_clients: int = Field(3, ge=2)
    """The fewest clients over which a sum is opened. Of two, each can subtract its own part from the sum."""
    max_rows: int | None = Field(None, ge=1, le=1_000_000_000)
    """With weights by rows: the most that one client counts for. Rows stay hidden, so this bounds them."""
    bits: int = Field(20, ge=16, le=32)
    """Of each number that is sent."""

    @model_validator(mode="after")
    def _used(self) -> Privacy:
        if not self.secure_aggregation:
            for key in ("min_clients", "max_rows", "bits"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"privacy.{key} has no meaning without privacy.secure_aggregation = true")
        return self
