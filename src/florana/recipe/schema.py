"""The recipe: everything a run needs, in one strict TOML file.

A misspelt key is refused with the nearest right one; combinations that cannot hold are refused here, before anything
is written. Relative paths count from the recipe's own folder. `to_toml` writes the resolved recipe, which runs again.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, model_validator

from florana.recipe.data_schema import Data, Generation, Partition, Section
from florana.recipe.privacy_schema import Privacy
from florana.recipe.robust_schema import Robust
from florana.recipe.server_schema import Server
from florana.recipe.study_schema import Study
from florana.recipe.train_schema import Engine, Train
from florana.score.glue import GLUE
from florana.strategy import built
from florana.strategy.base import Strategy

__all__ = [
    "Data",
    "Evaluate",
    "Generation",
    "Model",
    "Partition",
    "Privacy",
    "Recipe",
    "Robust",
    "Rounds",
    "Section",
    "Server",
    "Study",
    "Train",
]

FIGURES = {
    "sequence-classification": ("loss", "accuracy", "macro_f1", "matthews", "f1"),
    "sequence-regression": ("loss", "pearson", "spearman"),
    "causal-lm": ("loss", "perplexity"),
}
"""What a task's rows are measured by, as `florana.train.evaluate` has it."""


class Model(Section):
    """The base model and its LoRA modules."""

    base: str
    """A folder, a hub name, or `package:NAME[/sub/folder]` for a model that an installed Python package carries; a GGUF
    file by its path, as `package:NAME/FILE.gguf`, or as `OWNER/REPOSITORY/FILE.gguf`."""
    hub_name: str | None = Field(None, pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """The base's name on the hub, where `base` is a folder, a file or a package: what the adapter and its card name, so
    that others can load it."""
    adapter: str | None = None
    """Start from this adapter: a folder of any PEFT origin, a run's folder, or a hub name; its ranks, scalings and
    modules must be the recipe's. None: PEFT's own start."""
    target_modules: list[str] | str = "all-linear"
    """The last parts of module names; or a regular expression that matches whole names; or `all-linear`."""
    variant: Literal["lora", "dora"] = "lora"
    """dora: each row of W + scaling B A is given a trained length (arXiv 2402.09353)."""
    magnitude: Literal["average", "personal"] = "average"
    """DoRA's lengths: averaged by the server with the clients' weights, or kept by each client. As `head`."""
    rank: int = Field(8, ge=1)
    """r, of every LoRA module."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    """Other ranks for some modules, as in PEFT: a regular expression that ends the module's name at a dot -> rank."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """The same for alpha."""
    client_ranks: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1)
    """Lower ranks for some clients: dealt out in turn to the clients by name; none above `rank`."""
    alpha: float = Field(16.0, gt=0)
    """LoRA's alpha: an update is scaling B A, with scaling = alpha / rank."""
    rslora: bool = False
    """Scaling alpha / sqrt(rank) instead of alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Before A, in training."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    """Where the model is trained and measured; auto: cuda, else mps, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the base model; the adapter is always trained and aggregated in float32."""
    gradient_checkpointing: bool = False
    """Less memory, more time: what the backward pass needs is computed again."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Needs a CUDA device and bitsandbytes."""
    head: Literal["average", "personal"] = "average"
    """Tensors trained whole (the classifier): averaged by the server, or kept by each client."""

    @model_validator(mode="after")
    def _ranks(self) -> Model:
        if self.client_ranks is not None and max(self.client_ranks) > self.rank:
            raise ValueError(f"model.client_ranks has {max(self.client_ranks)}, above model.rank = {self.rank}")
        if self.client_ranks is not None and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                "model.client_ranks does not go with model.rank_pattern or model.alpha_pattern: a client's rank is one "
                "for all modules"
            )
        return self

    @model_validator(mode="after")
    def _names(self) -> Model:
        if self.target_modules == []:
            raise ValueError("model.target_modules is empty")
        regular = [self.target_modules] if isinstance(self.target_modules, str) else []
        for pattern in (*regular, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} in [model] is not a regular expression: {error}") from None
        return self

    @model_validator(mode="after")
    def _magnitudes(self) -> Model:
        if self.variant != "dora" and self.magnitude != "average":
            raise ValueError("model.magnitude is of model.variant = 'dora'")
        return self

    @property
    def personal(self) -> bool:
        """Whether tensors beside the factors stay with the clients: then the server has no model of its own."""
        return "personal" in (self.head, self.magnitude)

    def scaling_of(self, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) under rsLoRA."""
        return float(self.alpha / (rank**0.5 if self.rslora else rank))


class Rounds(Section):
    """The federation's rounds."""

    rounds: int = Field(10, ge=1)
    """How many rounds the run has."""
    clients_per_round: int | None = Field(None, ge=1)
    """None: all of them."""
    min_clients: int = Field(1, ge=1)
    """Fewer usable updates than this end the run with exit code 4."""
    weighting: Literal["examples", "uniform"] = "examples"
    """A client's weight: its number of training rows, or the same for all."""
    uplink: Literal["float32", "bfloat16", "int8"] = "float32"
    """How clients write what they send; the quantized ones write the change since the broadcast, rounded."""
    max_weight: float | None = Field(None, gt=0, le=1)
    """The most that one client weighs, as a share of the round; not given: one half of three clients or more, ten equal
    shares of more than twenty, no cap of two; under a [robust] rule a fifth above an equal share. What is above it
    goes to the others in proportion."""
    max_change: float = Field(10.0, gt=1)
    """An update that moved the model so many times further than the round's median update is refused."""


class Evaluate(Section):
    """What is measured, and how often."""

    every: int = Field(1, ge=1)
    """The global model is measured every so many rounds, and after the last."""
    personal: Literal["never", "last", "every"] = "last"
    """When clients measure their own models, on their local test split and on the common test set."""
    batch_size: int = Field(64, ge=1)
    """Rows per batch when measuring."""
    personal_limit: int | None = Field(512, ge=1)
    """The most rows of the common test set each client is measured on."""
    keep: Literal["last", "best"] = "last"
    """Which round's adapter RUN/adapter holds: the last one's, or that of the measured round which was best on the
    validation rows."""
    patience: int | None = Field(None, ge=1)
    """End the run after so many measured rounds in a row without a better one on the validation rows."""
    by: str = "loss"
    """The figure that says which is better: one of the validation rows' (accuracy, matthews, pearson, loss, ...)."""


class Recipe(Section):
    """A whole run."""

    title: str = ""
    """What the run is called on the screen and in the report."""
    seed: int = Field(0, ge=0)
    """Of everything drawn: the partition, the first adapter, the order of rows, which clients are asked."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Of torch's arithmetic, on which the last bits depend; None: the cores that it finds, or OMP_NUM_THREADS. A run
    that is resumed keeps its number; in a federation, what is given here holds for the server and every site."""
    task: Literal["sequence-classification", "sequence-regression", "causal-lm"]
    """sequence-regression: one output, trained by the mean squared error."""
    model: Model
    data: Data
    partition: Partition = Partition()
    train: Train
    federation: Rounds = Rounds()
    robust: Robust = Robust()
    privacy: Privacy = Privacy()
    strategy: dict[str, Any]
    """`name`, and the strategy's own options."""
    server: Server = Server()
    evaluate: Evaluate = Evaluate()
    engine: Engine = Engine()
    study: Study | None = None
    generation: Generation | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        if self.task != "causal-lm" and self.data.label is None:
            what = "class" if self.task == "sequence-classification" else "score"
            raise ValueError(f"data.label is missing: {self.task} needs the column with the {what}")
        if self.data.instructions == "prompt-response" and len(self.data.text) != 2 and self.data.text != "text":
            raise ValueError(f"data.text is {self.data.text!r}: of prompt-response it names two columns")
        if self.data.instructions is not None and self.task != "causal-lm":
            raise ValueError(f"data.instructions needs task = 'causal-lm': {self.task} gives no responses")
        if self.data.glue is not None:
            wanted = "sequence-classification" if GLUE[self.data.glue].labels else "sequence-regression"
            if self.task != wanted:
                raise ValueError(f"data.glue = '{self.data.glue}' needs task = '{wanted}', not '{self.task}'")
        if self.evaluate.by not in FIGURES[self.task]:
            raise ValueError(f"evaluate.by is {self.evaluate.by!r}; of {self.task}: {', '.join(FIGURES[self.task])}")
        if self.evaluate.keep == "best" or self.evaluate.patience is not None:
            self._chooses()
        if self.partition.kind == "sites" and self.data.validation_share > 0:
            raise ValueError(
                "data.validation_share has no meaning for sites, whose rows stay with them: give the "
                "server rows of its own by data.validation"
            )
        if self.engine.workers > 1 and (self.model.device != "cpu" or self.threads not in (None, 1)):
            raise ValueError("engine.workers above 1 needs model.device = 'cpu' and threads = 1 (or none given)")
        self.engine.require(self.train, self.model.gradient_checkpointing)
        if self.task != "causal-lm" and self.train.packing:
            raise ValueError("train.packing is of task = 'causal-lm': a class or a score is read at one place of a row")
        if self.task == "sequence-regression" and self.train.label_smoothing:
            raise ValueError("train.label_smoothing is of classes and tokens: a score has none")
        if self.task == "causal-lm" and self.model.head == "personal":
            raise ValueError("model.head = 'personal' has no meaning for causal-lm: no tensor is trained whole")
        if self.model.variant == "dora" and self.task != "causal-lm" and self.model.magnitude != self.model.head:
            magnitude, head = self.model.magnitude, self.model.head
            raise ValueError(
                f"model.magnitude = '{magnitude}' does not go with model.head = '{head}': what is trained beside the "
                "factors is averaged together, or stays with the clients together"
            )
        if self.model.personal and self.generation is not None:
            raise ValueError("[generation] needs a model at the server: nothing may be personal")
        if self.task != "causal-lm" and self.generation is not None:
            raise ValueError("[generation] needs task = 'causal-lm': a classifier writes no text")
        if self.partition.kind in ("dirichlet", "pathological", "column") and not (
            self.partition.by or self.data.label
        ):
            raise ValueError(f"partition.by is missing: {self.partition.kind} needs a column to split by")
        if self.model.adapter is not None and self.partition.kind == "sites":
            raise ValueError("model.adapter does not go with partition.kind = 'sites': the sites would need the folder")
        if self.model.adapter is not None and self.model.variant == "dora":
            raise ValueError("model.adapter does not go with model.variant = 'dora': magnitudes are not read back")
        unnamed = self.data.labels is None and self.data.glue is None
        if self.partition.kind == "sites" and self.task == "sequence-classification" and unnamed:
            raise ValueError("data.labels is missing: a site's own file may not show every class")
        if self.partition.kind not in ("column", "sites") and self.partition.clients is None:
            raise ValueError(f"partition.clients is missing: {self.partition.kind} needs the number of clients")
        per_round, clients = self.federation.clients_per_round, self.partition.clients
        if clients is not None and per_round is not None and per_round > clients:
            raise ValueError(f"federation.clients_per_round is {per_round}, but there are {clients} clients")
        reached = per_round if per_round is not None else clients
        if reached is not None and self.federation.min_clients > reached:
            raise ValueError(f"federation.min_clients is {self.federation.min_clients}, but {reached} are asked")
        velocity = self.server.velocity_rank
        if velocity is not None and velocity < self.model.rank:
            raise ValueError(f"server.velocity_rank is {velocity}, below model.rank = {self.model.rank}")
        if self.federation.min_clients < self.robust.fewest:
            raise ValueError(
                f"federation.min_clients is {self.federation.min_clients}: robust.rule = '{self.robust.rule}' with "
                f"{self.robust.hostile} hostile needs {self.robust.fewest} updates in every round"
            )
        if self.model.quantization != "none" and self.model.device in ("cpu", "mps"):
            raise ValueError(
                f"model.quantization = '{self.model.quantization}' needs model.device = 'cuda' (or 'auto' finding one)"
            )
        return self

    def _chooses(self) -> None:
        """Whether there is what `evaluate.keep` and `evaluate.patience` need; else a ValueError."""
        if not self.data.validated:
            raise ValueError(
                "evaluate.keep = 'best' and evaluate.patience choose by rows that are neither trained on nor scored: "
                "give data.validation_share = 0.1, or a file as data.validation"
            )
        if self.model.personal:
            raise ValueError(
                "evaluate.keep = 'best' and evaluate.patience need a model at the server: nothing may be personal"
            )

    def build_strategy(self) -> Strategy:
        """The strategy with its options, and with what `[server]` puts around it."""
        return self.server.around(built(self.strategy))

    def to_toml(self) -> str:
        """The recipe with every value in place; None values are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))
