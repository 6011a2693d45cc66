"""What secure sums and noise exclude in a recipe, each with the nearest thing that works."""

from __future__ import annotations

from florana.errors import RecipeError
from florana.recipe.schema import Recipe
from florana.strategy.base import Strategy

NEAREST = {
    "best-rank": "strategy.source = 'sums'",
    "flora-na": "strategy.name = 'best-rank' with strategy.source = 'sums'",
    "flexlora": "strategy.name = 'best-rank' with strategy.source = 'sums'",
    "oracle": "strategy.name = 'best-rank' with strategy.source = 'sums'",
}
"""For methods that need factors: the nearest that needs sums alone."""


def require_sums(recipe: Recipe, strategy: Strategy) -> None:
    """Raise RecipeError where secure sums do not go with the rest of the recipe."""
    if recipe.server.optimizer == "extrapolate" and (strategy.sums is not None or recipe.privacy.secure_aggregation):
        raise RecipeError(
            "server.optimizer = 'extrapolate' does not go with sums alone",
            why="its step is as long as single clients' updates are apart",
            fix="set server.optimizer = 'momentum' or 'none'",
        )
    if not recipe.privacy.secure_aggregation:
        return
    if not strategy.facts.secure_aggregation.startswith("yes"):
        near = NEAREST.get(strategy.name, "one of fedit, ffa-lora, fedsvd, rolora, or best-rank from sums")
        raise RecipeError(
            f"the strategy '{strategy.name}' does not go with privacy.secure_aggregation",
            why=strategy.facts.secure_aggregation.removeprefix("no: "),
            fix=f"set {near} (of a study: leave it out of the controls)",
        )
    rounds = recipe.federation
    wrong = [
        (recipe.robust.rule != "none", "robust.rule", "rules compare single clients' updates", "it to 'none'"),
        (rounds.uplink != "float32", "federation.uplink", "privacy.bits says how numbers are sent", "it to 'float32'"),
        (rounds.max_weight is not None, "federation.max_weight", "the server sees no weights", "privacy.max_rows"),
        (recipe.evaluate.personal != "never", "evaluate.personal", "it would tell of one client", "it to 'never'"),
    ]
    for holds, key, why, fix in wrong:
        if holds:
            raise RecipeError(f"{key} does not go with privacy.secure_aggregation", why=why, fix=f"set {fix}")
    by_rows = recipe.federation.weighting == "examples"
    if by_rows and recipe.privacy.max_rows is None:
        raise RecipeError(
            "privacy.max_rows is missing: the most rows that one client counts for",
            why="the server does not learn a client's rows, and cannot hold it to them",
            fix="give a number that no client exceeds by much, or set federation.weighting = 'uniform'",
        )
    if not by_rows and recipe.privacy.max_rows is not None:
        raise RecipeError("privacy.max_rows has no meaning with federation.weighting = 'uniform'", fix="leave it out")
    bounded = recipe.train.optimizer == "adamw" or (
        recipe.train.optimizer == "sgd" and recipe.train.max_grad_norm is not None and recipe.train.weight_decay == 0
    )
    if not bounded:
        raise RecipeError(
            f"train.optimizer = '{recipe.train.optimizer}' does not go with privacy.secure_aggregation as it is set",
            why="sums need a bound on how far training can move a number",
            fix="set train.optimizer = 'adamw', or 'sgd' with train.max_grad_norm and no train.weight_decay",
        )
    asked = recipe.federation.clients_per_round or recipe.partition.clients
    if asked is not None and asked < recipe.privacy.min_clients:
        raise RecipeError(
            f"privacy.min_clients is {recipe.privacy.min_clients}, but {asked} clients are asked",
            fix="ask more clients, or lower it (of two, each can subtract its own part)",
        )


def require_noise(recipe: Recipe, strategy: Strategy) -> None:
    """Raise RecipeError where noise at the clients does not go with the rest of the recipe."""
    own, train = recipe.privacy, recipe.train
    if own.unit is None:
        return None
    if own.unit == "clients":
        return _require_noisy_sums(recipe, strategy)
    wrong = [
        (recipe.evaluate.personal != "never", "evaluate.personal", "it tells of rows without noise", "it to 'never'"),
        (train.packing, "train.packing", "several rows go through the model as one", "it to false"),
        (train.neftune_noise_alpha is not None, "train.neftune_noise_alpha", "noise is drawn per row", "it aside"),
        (recipe.engine.cohort != 1, "engine.cohort", "a pass holds the rows of one client apart", "it to 1"),
        (recipe.model.gradient_checkpointing, "model.gradient_checkpointing", "rows have gradients of their own",
         "a lower train.batch_size with train.gradient_accumulation_steps"),
        (strategy.begin == "gradient", "strategy.begin = 'gradient'", "it is made from gradients without noise",
         "another start"),
    ]  # fmt: skip
    for holds, key, why, fix in wrong:
        if holds:
            raise RecipeError(f"{key} does not go with privacy.unit = '{own.unit}'", why=why, fix=f"set {fix}")
    return None


def _require_noisy_sums(recipe: Recipe, strategy: Strategy) -> None:
    """The same of noise on sums over clients."""
    rounds = recipe.federation
    source = "strategy.name to 'best-rank' with strategy.source = 'sums', or to 'fedask'"
    wrong = [
        (strategy.sums is None, f"the strategy '{strategy.name}'", "noise goes on sums of sketches", source),
        (recipe.privacy.secure_aggregation and recipe.model.client_ranks is not None, "model.client_ranks", "parts of "
         "unlike clients are sums of more than changes, which noise would not cover", "it aside"),
        (rounds.weighting != "uniform", f"federation.weighting = '{rounds.weighting}'", "a client with many rows would "
         "move the sum by more than its clip", "it to 'uniform'"),
        (recipe.robust.rule != "none", "robust.rule", "who counts would follow from others' updates", "it to 'none'"),
        (rounds.max_weight is not None, "federation.max_weight", "all count alike", "it aside"),
        (rounds.uplink != "float32", "federation.uplink", "what rounding leaves out is carried past the clip",
         "it to 'float32'"),
        (recipe.evaluate.personal != "never", "evaluate.personal", "it tells of one client", "it to 'never'"),
    ]  # fmt: skip
    for holds, what, why, fix in wrong:
        if holds:
            raise RecipeError(f"{what} does not go with privacy.unit = 'clients'", why=why, fix=f"set {fix}")
