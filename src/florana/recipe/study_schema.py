"""The recipe's section [study]: what `florana compare` varies, tunes and declares."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from florana.recipe.data_schema import Section


class Study(Section):
    """What `florana compare` varies; the command line's options come before these."""

    methods: list[str] = Field([])
    """Names of strategies, with options in brackets (`best-rank[carry_rank=8]`), or FILE.py:FUNCTION."""
    seeds: int = Field(3, ge=1)
    """How many; the recipe's `seed` is the first, the others follow it."""
    alphas: list[Annotated[float, Field(gt=0)]] = Field([])
    """Dirichlet parameters to compare at; empty: the recipe's partition."""
    ranks: list[Annotated[int, Field(ge=1)]] = Field([])
    """LoRA ranks to compare at, alpha / rank kept; empty: the recipe's."""
    controls: list[Literal["oracle", "centralised", "local-only"]] = Field(["oracle", "centralised", "local-only"])
    """What stands beside the methods: the exact average, one client with all rows, clients that never send."""
    fixed_updates_rounds: list[Annotated[int, Field(ge=1)]] = Field([])
    """Rounds whose client adapters are given to every rule in turn (the swap test); empty: the first and the last."""
    fixed_updates_rounds_on: int = Field(0, ge=0)
    """For how many rounds each rule goes on from its own merge, with the same rows and seeds for all, and is scored
    again; 0: not at all."""
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Dotted keys of the recipe and the values to try for each method, chosen on the validation rows by successive
    halving before any score; a key that has no meaning with a method is left out for it."""
    tune_seeds: int = Field(1, ge=1)
    """On how many seeds each value is tried; they are none of those that are scored."""
    comparisons: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field([])
    """Pairs of methods, the first minus the second: the comparisons declared before any score, whose p-values are
    corrected together (Holm). Empty: each method minus FedIT."""
