"""The recipe: everything a run needs, in one strict TOML file.

A misspelt key is refused with the nearest right one; combinations that cannot hold are refused here, before anything
is written. Relative paths count from the recipe's own folder. `to_toml` writes the resolved recipe, which runs again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator

from florana.score.tasks import TaskName
from florana.strategy import builder
from florana.strategy.base import Strategy


class Section(BaseModel):
    """One table of the recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The base model and its LoRA modules."""

    base: str
    """A folder, a hub name, or `package:NAME[/sub/folder]` for a model that an installed Python package carries."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    rank: int = Field(8, ge=1)
    client_ranks: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1)
    """Lower ranks for some clients: dealt out in turn to the clients by name; none above `rank`."""
    alpha: float = Field(16.0, gt=0)
    rslora: bool = False
    """Scaling alpha / sqrt(rank) instead of alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the base model; the adapter is always trained and aggregated in float32."""
    gradient_checkpointing: bool = False
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Needs a CUDA device and bitsandbytes."""
    head: Literal["average", "personal"] = "average"
    """Tensors trained whole (the classifier): averaged by the server, or kept by each client."""

    @model_validator(mode="after")
    def _ranks(self) -> Model:
        if self.client_ranks is not None and max(self.client_ranks) > self.rank:
            raise ValueError(f"model.client_ranks has {max(self.client_ranks)}, above model.rank = {self.rank}")
        return self

    def scaling_of(self, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) under rsLoRA."""
        return float(self.alpha / (rank**0.5 if self.rslora else rank))


class Data(Section):
    """Where the examples are: files (csv, tsv, jsonl, json, parquet), a hub name, or `stdlib-docstrings`."""

    train: str
    """For `partition.kind = "sites"`: a folder with one file per client, named after it."""
    test: str | None = None
    """The common test set; None sets `test_share` of the training rows apart, by the seed (of sites: there is none)."""
    test_share: float = Field(0.2, gt=0, lt=1)
    text: str | list[str] = "text"
    """The column with the text, or two columns (a pair; prompt and continuation for causal-lm)."""
    label: str | None = None
    """The column with the class; required for sequence-classification."""
    labels: list[str] | None = Field(None, min_length=2)
    """All classes, in order; required where each site has its own file, which may not show every class."""
    max_length: int = Field(128, ge=4)
    """Tokens; longer texts are cut."""
    train_limit: int | None = Field(None, ge=1)
    """Use only this many training rows, chosen by the seed."""
    test_limit: int | None = Field(None, ge=1)
    hub_config: str | None = None
    train_split: str = "train"
    test_split: str = "test"


class Partition(Section):
    """How the training rows are dealt out to the clients."""

    kind: Literal[
        "iid", "dirichlet", "pathological", "column", "length", "linear", "square", "exponential", "sites"
    ] = "iid"
    """dirichlet: shares of each class by Dirichlet(alpha). pathological: `classes` classes each. column: one client per
    value of `by`. length: rows sorted by text length. linear, square, exponential: unequal sizes. sites: each client
    has a file of its own."""
    clients: int | None = Field(None, ge=1)
    """How many; given by the data for `column` and `sites`."""
    alpha: float = Field(0.5, gt=0)
    classes: int = Field(2, ge=1)
    by: str | None = None
    """The column to split by; the label where it is not given."""
    smallest: int = Field(2, ge=1)
    """The fewest rows a client may get."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """The share of a client's rows kept as its own test share, for the personal score."""


class Train(Section):
    """A client's local training in one round."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; give this or `epochs`."""
    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class Rounds(Section):
    """The federation's rounds."""

    rounds: int = Field(10, ge=1)
    clients_per_round: int | None = Field(None, ge=1)
    """None: all of them."""
    min_clients: int = Field(1, ge=1)
    """Fewer usable updates than this end the run with exit code 4."""
    weighting: Literal["examples", "uniform"] = "examples"


class Evaluate(Section):
    """What is measured, and how often."""

    every: int = Field(1, ge=1)
    """The global model is measured every so many rounds, and after the last."""
    personal: Literal["never", "last", "every"] = "last"
    """When clients measure their own models, on their own test share and on the common test set."""
    batch_size: int = Field(64, ge=1)
    personal_limit: int | None = Field(512, ge=1)
    """The most rows of the common test set each client is measured on."""


class Study(Section):
    """What `florana compare` varies; the command line's options come before these."""

    methods: list[str] = []
    """Names of strategies, with options in brackets (`best-rank[memory=8]`), or FILE.py:FUNCTION."""
    seeds: int = Field(3, ge=1)
    alphas: list[Annotated[float, Field(gt=0)]] = []
    """Dirichlet parameters to compare at; empty: the recipe's partition."""
    ranks: list[Annotated[int, Field(ge=1)]] = []
    """LoRA ranks to compare at, alpha / rank kept; empty: the recipe's."""
    controls: list[Literal["oracle", "centralised", "local-only"]] = ["oracle", "centralised", "local-only"]
    swap_rounds: list[Annotated[int, Field(ge=1)]] = []
    """Rounds whose client adapters are given to every rule in turn (the swap test); empty: the first and the last."""


class Generation(Section):
    """Scoring by what the global model writes: after the last round, and every so many rounds."""

    task: TaskName
    """Its prompts and figures are those of lm-eval's task of that name (`math`: hendrycks_math)."""
    file: str
    """The problems: jsonl or json, also gzipped. Of MBPP, the ids 11 to 510 are scored, as published."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many problems."""
    every: int | None = Field(None, ge=1)
    """None: after the last round alone."""
    prompt: str | None = None
    """A prompt of one's own, with columns in braces: for a model trained on another form."""
    shots: int = Field(0, ge=0)
    """Worked examples before each question, the same for all, chosen by the seed (of MBPP: the ids 2, 3, ...)."""
    examples: str | None = None
    """The file the worked examples come from; None takes data.train (of MBPP: `file`)."""
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(16, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    samples: int = Field(1, ge=1)
    """Completions per problem; exact_match is their mean."""
    k: list[Annotated[int, Field(ge=1)]] = Field([1], min_length=1)
    """pass@k for each of these, of `samples` programs."""
    run_programs: bool = False
    """Required for humaneval and mbpp: programs that a model wrote run on this machine."""
    program_seconds: int = Field(5, ge=1)
    """Processor time of one program with its tests; by the clock, three times as much."""
    program_memory: int = Field(1024, ge=64)
    """MiB of address space."""

    @model_validator(mode="after")
    def _code(self) -> Generation:
        if self.task in ("humaneval", "mbpp"):
            if not self.run_programs:
                raise ValueError(
                    f"generation.task = '{self.task}' runs programs that a model wrote on this machine: set "
                    "generation.run_programs = true if you want that (they are shut in, see florana.score.programs)"
                )
            if max(self.k) > self.samples:
                raise ValueError(f"generation.k asks for pass@{max(self.k)}, but generation.samples = {self.samples}")
        elif self.k != [1] or self.run_programs:
            raise ValueError(f"generation.k and generation.run_programs are of humaneval and mbpp, not {self.task}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("generation.samples above 1 needs generation.temperature above 0: greedy ones are alike")
        if self.shots and self.task == "humaneval":
            raise ValueError("generation.shots has no meaning for humaneval: its prompts stand alone")
        if self.examples is not None and not self.shots:
            raise ValueError("generation.examples is given, but generation.shots = 0")
        return self


class Recipe(Section):
    """A whole run."""

    title: str = ""
    seed: int = Field(0, ge=0)
    task: Literal["sequence-classification", "causal-lm"]
    model: Model
    data: Data
    partition: Partition = Partition()
    train: Train
    federation: Rounds = Rounds()
    strategy: dict[str, Any]
    """`name`, and the strategy's own options."""
    evaluate: Evaluate = Evaluate()
    study: Study | None = None
    generation: Generation | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        if self.task == "sequence-classification" and self.data.label is None:
            raise ValueError("data.label is missing: sequence-classification needs the column with the class")
        if self.task == "causal-lm" and self.model.head == "personal":
            raise ValueError("model.head = 'personal' has no meaning for causal-lm: no tensor is trained whole")
        if self.task != "causal-lm" and self.generation is not None:
            raise ValueError("[generation] needs task = 'causal-lm': a classifier writes no text")
        if self.partition.kind in ("dirichlet", "pathological", "column") and not (
            self.partition.by or self.data.label
        ):
            raise ValueError(f"partition.by is missing: {self.partition.kind} needs a column to split by")
        if self.partition.kind == "sites" and self.task != "causal-lm" and self.data.labels is None:
            raise ValueError("data.labels is missing: a site's own file may not show every class")
        if self.partition.kind not in ("column", "sites") and self.partition.clients is None:
            raise ValueError(f"partition.clients is missing: {self.partition.kind} needs the number of clients")
        per_round, clients = self.federation.clients_per_round, self.partition.clients
        if clients is not None and per_round is not None and per_round > clients:
            raise ValueError(f"federation.clients_per_round is {per_round}, but there are {clients} clients")
        reached = per_round if per_round is not None else clients
        if reached is not None and self.federation.min_clients > reached:
            raise ValueError(f"federation.min_clients is {self.federation.min_clients}, but {reached} are asked")
        if self.model.quantization != "none" and self.model.device in ("cpu", "mps"):
            raise ValueError(
                f"model.quantization = '{self.model.quantization}' needs model.device = 'cuda' (or 'auto' finding one)"
            )
        return self

    def build_strategy(self) -> Strategy:
        """The strategy with its options."""
        build = builder(self.strategy["name"])
        if build is None:
            raise ValueError(f"there is no strategy '{self.strategy['name']}'")
        return build(**{name: value for name, value in self.strategy.items() if name != "name"})

    def to_toml(self) -> str:
        """The recipe with every value in place; None values are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))
