"""The recipe's [privacy]: what the server may see of a client."""

from __future__ import annotations

from typing import Literal

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

    unit: Literal["examples", "clients"] | None = None
    """Whose presence is hidden by noise, with an epsilon that is counted. examples: one row, by DP-SGD at each
    client; `batch_size` rows a step are then the expected number (Poisson sampling). clients: all that one client
    holds, by noise of the server's on the sums of `best-rank` from sums or `fedask`; the server itself sees updates."""
    epsilon: float | None = Field(None, gt=0)
    """What each client's rows may cost in all; a client answers no round that would cost more."""
    delta: float | None = Field(None, gt=0, lt=1)
    """The probability that epsilon does not hold; far below one over a client's rows."""
    clip: float | None = Field(None, gt=0)
    """C: a row's gradient, in all that is trained, is cut to this norm; of clients, the change of the product."""
    noise_multiplier: float | None = Field(None, gt=0)
    """The noise's standard deviation over `clip`. Left out: the least with which all rounds fit."""
    max_rounds: int | None = Field(None, ge=1)
    """The rounds that one client trains in at most, for which noise is computed; left out: all of the run."""
    accountant: Literal["pld", "rdp"] = "pld"
    """pld: privacy loss distributions; rdp: Renyi's divergences, looser, for figures beside those of papers."""

    @model_validator(mode="after")
    def _used(self) -> Privacy:
        noisy = ("epsilon", "delta", "clip")
        if self.unit is None:
            for key in (*noisy, "noise_multiplier", "max_rounds", "accountant"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"privacy.{key} has no meaning without privacy.unit")
        elif missing := [key for key in noisy if getattr(self, key) is None]:
            raise ValueError(f"privacy.unit = '{self.unit}' needs privacy.{missing[0]} too")
        if self.noise_multiplier is not None and self.max_rounds is not None:
            raise ValueError("privacy.max_rounds has no meaning with privacy.noise_multiplier: the budget ends it")
        if not self.secure_aggregation:
            for key in ("min_clients", "max_rows", "bits"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"privacy.{key} has no meaning without privacy.secure_aggregation = true")
        return self
