"""florana's methods for a user's own Flower app, one class each, in the place of `flwr.serverapp.strategy.FedAvg`.

Every class takes the method's own options and those of `Common`, by name. Which clients they need:

    any PEFT client    FedIT FloraNA BestRank FlexLora HetLora LoraFair FedRot
    receive and reply  Oracle FedExLora Florist Flora FfaLora RoLora FedSVD FedSALora, BestRank with `broadcast_*`

The second line's methods send a frozen part beside the LoRA factors, or train one factor, or leave one with its client;
a client that does not use `florana.flower.receive` and `florana.flower.reply` is refused, with that as the reason.

Three methods have no class. Fed-SB and RAVAN train small matrices inside the layers, which a PEFT model does not have;
FRLoRA (and Fed-SB) begin at singular vectors of the base weights, which the server of a plain app does not hold. They
run in florana's own engines.
"""

from __future__ import annotations

from typing import Literal, Unpack

from florana.flower.dropin.lora_strategy import Common, LoraStrategy
from florana.recipe.load import check_strategy
from florana.strategy import STRATEGIES
from florana.strategy.base import Strategy


def _built(name: str, **options: object) -> Strategy:
    """The method with its options, those of None left out. Raises RecipeError for a value that it does not have."""
    given = {key: value for key, value in options.items() if value is not None}
    check_strategy({"name": name, **given}, "florana.flower")
    return STRATEGIES[name](**given)


class FedIT(LoraStrategy):
    """A and B averaged apart, as FedAvg does, behind florana's gate. See `florana.strategy.fedit`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(_built("fedit"), **common)


class FloraNA(LoraStrategy):
    """FLoRA-NA: one fitted coefficient per client and factor, or rank component too. See `florana.strategy.flora_na`.

    >>> FloraNA(lora_alpha=16, min_train_nodes=3).method.name
    'flora-na'
    """

    def __init__(
        self,
        *,
        combine: Literal["factors", "updates"] = "factors",
        scope: Literal["module", "model", "model-relative", "component"] = "module",
        solver: Literal["als", "adamw"] = "als",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(_built("flora-na", combine=combine, scope=scope, solver=solver), **common)


class BestRank(LoraStrategy):
    """The adapter of the clients' rank nearest to the true average. See `florana.strategy.best_rank`."""

    def __init__(
        self,
        *,
        gauge: Literal["balanced", "orthonormal", "aligned"] = "balanced",
        memory: int = 0,
        broadcast_rank: int | None = None,
        broadcast_error: float | None = None,
        broadcast_bytes: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        wide = {
            "broadcast_rank": broadcast_rank,
            "broadcast_error": broadcast_error,
            "broadcast_bytes": broadcast_bytes,
        }
        super().__init__(_built("best-rank", gauge=gauge, memory=memory, **wide), **common)


class Oracle(LoraStrategy):
    """The exact average: the best adapter, and all the rest frozen beside it. See `florana.strategy.oracle`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(_built("oracle"), **common)


class FfaLora(LoraStrategy):
    """A frozen at its start, B trained and averaged. See `florana.strategy.ffa_lora`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(_built("ffa-lora"), **common)


class FedSALora(LoraStrategy):
    """A averaged, B kept by its client. See `florana.strategy.fedsa_lora`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(_built("fedsa-lora"), **common)


class RoLora(LoraStrategy):
    """B and A trained and averaged in turn. See `florana.strategy.rolora`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(_built("rolora"), **common)


class Flora(LoraStrategy):
    """FLoRA: the exact sum into a frozen part, fresh factors every round. See `florana.strategy.flora`."""

    def __init__(self, *, residual_rank: int | None = None, **common: Unpack[Common]) -> None:
        super().__init__(_built("flora", residual_rank=residual_rank), **common)


class FedExLora(LoraStrategy):
    """Factor means and their exact remainder. See `florana.strategy.fedex_lora`."""

    def __init__(self, *, residual_rank: int | None = None, **common: Unpack[Common]) -> None:
        super().__init__(_built("fedex-lora", residual_rank=residual_rank), **common)


class FlexLora(LoraStrategy):
    """The true average decomposed, to each client its own rank. See `florana.strategy.flexlora`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(_built("flexlora"), **common)


class Florist(LoraStrategy):
    """As many singular components as hold a share of the energy. See `florana.strategy.florist`."""

    def __init__(self, *, energy: float = 0.99, **common: Unpack[Common]) -> None:
        super().__init__(_built("florist", energy=energy), **common)


class HetLora(LoraStrategy):
    """Zero-padded factors averaged, larger updates counting more. See `florana.strategy.hetlora`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(_built("hetlora"), **common)


class FedSVD(LoraStrategy):
    """B averaged, then B A turned by its SVD into a new A. See `florana.strategy.fedsvd`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(_built("fedsvd"), **common)


class LoraFair(LoraStrategy):
    """The mean A, and a B corrected towards the true average. See `florana.strategy.lora_fair`."""

    def __init__(self, *, penalty: float = 0.01, **common: Unpack[Common]) -> None:
        super().__init__(_built("lora-fair", penalty=penalty), **common)


class FedRot(LoraStrategy):
    """Factors turned to the last broadcast before averaging. See `florana.strategy.fedrot`."""

    def __init__(
        self,
        *,
        align: Literal["in-turn", "joint"] = "in-turn",
        strength: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(_built("fedrot", align=align, strength=strength), **common)
