"""florana's methods for a user's own Flower app, one class each, in the place of `flwr.serverapp.strategy.FedAvg`.

Every class is made from its method's declaration: it takes the method's own options (those of its `build`) and those of
`Common`, by name. Which clients they need:

    any PEFT client    FedIT FloraNA BestRank FlexLora HetLora LoraFair FedRot
    receive and reply  Oracle FedExLora Florist Flora FfaLora RoLora FedSVD FedSALora, BestRank with `broadcast_*`

The second line's methods send a frozen part beside the LoRA factors, or train one factor, or leave one with its client;
a client that does not use `florana.flower.receive` and `florana.flower.reply` is refused, with that as the reason.

Four methods have no class. Fed-SB and RAVAN train small matrices inside the layers, which a PEFT model does not have;
FRLoRA (and Fed-SB) begin at singular vectors of the base weights, which the server of a plain app does not hold;
FedASK (as BestRank with source = "sums") asks its clients twice in a round. They run in florana's own engines.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from florana.errors import RecipeError, nearest
from florana.flower.dropin.lora_strategy import Common, LoraStrategy
from florana.recipe.renamed import current
from florana.recipe.strategy_options import check_strategy
from florana.strategy import STRATEGIES

FOR_CLIENTS_ONLY = {"hetlora": ("gamma", "penalty")}
"""Options that act in the training of florana's own clients, which a plain app does not have."""


class MethodStrategy(LoraStrategy):
    """A method by its name; the classes of this module are this one with `name` set.

    Args:
        **options: the method's own, as in a recipe's section [strategy], and those of `Common`.

    Raises:
        RecipeError: an option that neither has, or a value that it does not take.

    Examples:
        >>> FloraNA(scope="component", lora_alpha=16, min_train_nodes=3).method.name
        'flora-na'
    """

    name: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        known = inspect.signature(type(self)).parameters
        own = {key: value for key, value in options.items() if key not in Common.__annotations__}
        own = current("strategy", own)
        for key in sorted(own.keys() - known.keys()):
            raise RecipeError(f"{type(self).__name__} has no option '{key}'", fix=nearest(key, known))
        own = {key: value for key, value in own.items() if value is not None}
        check_strategy({"name": self.name, **own}, "florana.flower")
        common = {key: value for key, value in options.items() if key in Common.__annotations__}
        super().__init__(STRATEGIES[self.name](**own), **common)


def _class_of(title: str, name: str) -> type[MethodStrategy]:
    """The class of one method, with its options in its signature, as `help` and editors show them."""
    build = STRATEGIES[name]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(build, eval_str=True).parameters.values()
        if parameter.name not in FOR_CLIENTS_ONLY.get(name, ())
    ]
    common = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None) for key in Common.__annotations__]
    summary = inspect.getdoc(inspect.getmodule(build)) or ""
    made = type(title, (MethodStrategy,), {"name": name, "__doc__": summary, "__module__": __name__})
    made.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    return made


BestRank = _class_of("BestRank", "best-rank")
FedExLora = _class_of("FedExLora", "fedex-lora")
FedIT = _class_of("FedIT", "fedit")
FedRot = _class_of("FedRot", "fedrot")
FedSALora = _class_of("FedSALora", "fedsa-lora")
FedSVD = _class_of("FedSVD", "fedsvd")
FfaLora = _class_of("FfaLora", "ffa-lora")
FlexLora = _class_of("FlexLora", "flexlora")
Flora = _class_of("Flora", "flora")
FloraNA = _class_of("FloraNA", "flora-na")
Florist = _class_of("Florist", "florist")
HetLora = _class_of("HetLora", "hetlora")
LoraFair = _class_of("LoraFair", "lora-fair")
Oracle = _class_of("Oracle", "oracle")
RoLora = _class_of("RoLora", "rolora")
