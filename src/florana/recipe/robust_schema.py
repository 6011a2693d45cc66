"""The recipe's [robust]: which rule stands before the strategy, and how many clients it is to withstand."""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import Field, model_validator

from florana.recipe.data_schema import Section
from florana.robust import multi_krum, trimmed
from florana.robust.clip import clip
from florana.robust.geometric_median import geometric_median
from florana.robust.verdict import Rule, by_distance


class Robust(Section):
    """What keeps a minority of clients from steering the model; see docs/reliability.md for what each rule assumes."""

    rule: Literal["none", "clip", "multi-krum", "geometric-median", "trimmed"] = "none"
    """none: nothing beside the bounds that always hold."""
    hostile: int | None = Field(None, ge=1)
    """f, how many clients of a round may be hostile: of multi-krum (at least 2 f + 3 clients) and trimmed (2 f + 1)."""
    radius: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Of clip: how far a client may move the model, in changes of the median client; 1 where not given."""
    smoothing: float | None = Field(None, gt=0, lt=1)
    """Of geometric-median: nu, in distances between clients; 0.001 where not given."""

    @model_validator(mode="after")
    def _options(self) -> Robust:
        own = {"clip": "radius", "geometric-median": "smoothing", "multi-krum": "hostile", "trimmed": "hostile"}
        for name in ("hostile", "radius", "smoothing"):
            if getattr(self, name) is not None and own.get(self.rule) != name:
                whose = " and ".join(rule for rule, option in own.items() if option == name)
                raise ValueError(f"robust.{name} is of {whose}, and robust.rule is '{self.rule}'")
        if own.get(self.rule) == "hostile" and self.hostile is None:
            raise ValueError(f"robust.hostile is missing: how many clients of a round is '{self.rule}' to withstand?")
        return self

    @property
    def fewest(self) -> int:
        """The fewest updates of a round with which the rule can hold."""
        needs = {"multi-krum": multi_krum.fewest, "trimmed": trimmed.fewest}
        return needs[self.rule](self.hostile or 1) if self.rule in needs else 1

    def build(self) -> Rule | None:
        """The rule with its options; None for none."""
        hostile = self.hostile or 1
        rules = {
            "clip": clip(self.radius or 1.0),
            "multi-krum": by_distance(multi_krum.multi_krum(hostile)),
            "geometric-median": by_distance(functools.partial(geometric_median, smoothing=self.smoothing or 1e-3)),
            "trimmed": by_distance(trimmed.trimmed(hostile)),
        }
        return rules.get(self.rule)
