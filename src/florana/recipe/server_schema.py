"""The recipe's section [server]: what is done with a round's average once it is known."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from florana.recipe.data_schema import Section
from florana.strategy.base import Strategy
from florana.strategy.factorized import with_factorization
from florana.strategy.moments import ServerStep
from florana.strategy.server_optimizer import with_optimizer


class Server(Section):
    """What the server does with the round's average once it is known; sends no bytes."""

    optimizer: Literal["none", "momentum", "nesterov", "adam", "extrapolate"] = "none"
    """The average update taken for a gradient: momentum and Nesterov on a velocity, Adam (FedAdam), FedExP's
    extrapolated step; the formulas stand in `florana.strategy.server_optimizer`."""
    space: Literal["auto", "products", "factors"] = "auto"
    """Where: on the products B A, or on the factors (FedAvgM, FedAdam); auto takes the strategy's own."""
    learning_rate: float = Field(1.0, gt=0)
    """eta, the step's length; 1 is the average itself where the optimizer is `none` or beta is 0."""
    beta: float | None = Field(None, ge=0, lt=1)
    """Of the velocity, 0.5 where not given; of Adam's first moment, 0.9."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Of Adam's second moment."""
    epsilon: float = Field(1e-3, gt=0)
    """Adam's: added to the root of the second moment (tau in FedAdam)."""
    velocity_rank: int | None = Field(None, ge=1)
    """The most singular components per module in which a velocity on products is kept; twice the rank if not given."""
    factorization: Literal["as-averaged", "balanced", "orthonormal", "aligned"] = "as-averaged"
    """In which of the equivalent factors the same product goes back."""

    @model_validator(mode="after")
    def _fits(self) -> Server:
        unused = {"none": ["space", "learning_rate", "beta", "beta2", "epsilon", "velocity_rank"]}
        unused |= {"momentum": ["beta2", "epsilon"], "nesterov": ["beta2", "epsilon"], "adam": ["velocity_rank"]}
        unused |= {"extrapolate": ["beta", "beta2", "epsilon", "velocity_rank"]}
        for key in unused[self.optimizer]:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"server.{key} has no meaning with server.optimizer = '{self.optimizer}'")
        return self

    def around(self, strategy: Strategy) -> Strategy:
        """The strategy with this section's optimizer and factorization. Raises RecipeError where they do not fit."""
        usual = 0.9 if self.optimizer == "adam" else 0.5
        step = ServerStep(
            self.optimizer,
            self.learning_rate,
            usual if self.beta is None else self.beta,
            self.beta2,
            self.epsilon,
            self.velocity_rank,
        )
        moved = with_optimizer(strategy, step, None if self.space == "auto" else self.space)
        return with_factorization(moved, self.factorization)
