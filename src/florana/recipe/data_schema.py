"""The recipe's sections about data: what is learnt, how it is dealt out, and what the model is asked to write."""

from __future__ import annotations

import io
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from florana.score.benchmarks import TaskName
from florana.score.glue import GLUE, HUB, GlueName


class Section(BaseModel):
    """One table of the recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """Where the examples are: files (csv, tsv, jsonl, json, parquet), a hub name, or `stdlib-docstrings`."""

    glue: GlueName | None = None
    """A task of GLUE by name: columns, labels, metrics and splits are those of `florana.score.glue`. Without `train`,
    all comes from the hub."""
    train: str
    """For `partition.kind = "sites"`: a folder with one file per client, named after it."""
    test: str | None = None
    """The common test set; None sets `test_share` of the training rows apart, by the seed (of sites: there is none)."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Of the training rows, where there is no test set of its own."""
    validation: str | None = None
    """Rows to choose by, a file or hub name: by `evaluate.keep`, `evaluate.patience` and `compare --tune`. They are
    neither trained on nor scored."""
    validation_share: float = Field(0.0, ge=0, lt=1)
    """Of the training rows, set apart by the seed for the same, where `validation` is not given; 0: none."""
    text: str | list[str] = "text"
    """The column with the text, or two columns (a pair; prompt and continuation for causal-lm)."""
    instructions: Literal["alpaca", "dolly", "prompt-response", "messages", "sharegpt"] | None = None
    """causal-lm: rows of prompts and responses in the place of `text`; only responses count in the loss. Columns:
    instruction, input, output; instruction, context, response; prompt, response (or the two that `text` names); a list
    of messages; ShareGPT's conversations."""
    template: Literal["plain", "chat"] = "plain"
    """How instructions become one text: florana's own template (docs/tasks.md), or the tokenizer's chat template."""
    too_long: Literal["error", "drop"] = "error"
    """What becomes of an instruction that fills `max_length`: an error, or a row left out and counted in setup.json."""
    label: str | None = None
    """The column with the class (sequence-classification) or the number (sequence-regression); required for both."""
    labels: list[str] | None = Field(None, min_length=2)
    """All classes, in order; required where each site has its own file, which may not show every class."""
    test_mismatched: str | None = None
    """MNLI's second test set, a file or hub name: its figures end in `_mismatched`."""
    encoding: str = "utf-8"
    """Of csv, tsv, jsonl and json files, by Python's name for it: latin-1, cp1252, utf-16, shift_jis, ..."""
    max_length: int = Field(128, ge=4)
    """Tokens; longer texts are cut."""
    train_limit: int | None = Field(None, ge=1)
    """Use only this many training rows, chosen by the seed."""
    test_limit: int | None = Field(None, ge=1)
    """Use only this many test rows, chosen by the seed."""
    hub_config: str | None = None
    """The configuration of a hub data set."""
    train_split: str = "train"
    """Of a hub name. Rows by number may follow, of a file too: `train[600:974]` are the 601st to the 974th."""
    test_split: str = "test"
    """As `train_split`, of the test set."""
    validation_split: str = "validation"
    """As `train_split`, of the validation rows."""

    @model_validator(mode="before")
    @classmethod
    def _of_glue(cls, given: Any) -> Any:
        """A GLUE task's own values in the place of those that are not given."""
        name = given.get("glue") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in GLUE:
            return given
        task = GLUE[name]
        known: dict[str, Any] = {
            "text": list(task.columns[0]),
            "label": task.columns[1],
            "hub_config": name,
            "test_split": task.test,
        }
        if "train" not in given:
            known |= {"train": HUB, "test": HUB} | ({"test_mismatched": HUB} if task.mismatched else {})
        return known | given

    @field_validator("encoding")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=name)
        except (LookupError, ValueError):
            raise ValueError(f"data.encoding is {name!r}, which Python does not know for text") from None
        return name

    @model_validator(mode="after")
    def _only_where_it_means_something(self) -> Data:
        if self.instructions is None and (self.template, self.too_long) != ("plain", "error"):
            raise ValueError("data.template and data.too_long are of data.instructions, which is not given")
        if self.test_mismatched is not None and self.glue != "mnli":
            raise ValueError("data.test_mismatched is of data.glue = 'mnli' alone")
        if self.validation is not None and self.validation_share > 0:
            raise ValueError("data.validation and data.validation_share are both given: leave one of the two out")
        return self

    @property
    def validated(self) -> bool:
        """Whether there are rows to choose by."""
        return self.validation is not None or self.validation_share > 0


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
    """Of dirichlet: small is uneven (0.1), large is even (10)."""
    classes: int = Field(2, ge=1)
    """Of pathological: how many classes a client has."""
    bins: int = Field(5, ge=2)
    """Of sequence-regression: the scores count as classes by these many bins of equal width, over the range of the
    training scores."""
    by: str | None = None
    """The column to split by; the label where it is not given."""
    smallest: int = Field(2, ge=1)
    """The fewest rows a client may get."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """The share of a client's rows kept as its local test split, for the personal score."""


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
    template: Literal["plain", "chat"] = "plain"
    """chat: questions and worked solutions as turns of the tokenizer's own chat template, as lm-eval's
    `--apply_chat_template`."""
    shots: int = Field(0, ge=0)
    """Worked examples before each question, the same for all, chosen by the seed (of MBPP: the ids 2, 3, ...)."""
    examples: str | None = None
    """The file the worked examples come from; None takes data.train (of MBPP: `file`)."""
    max_new_tokens: int = Field(256, ge=1)
    """Of one completion."""
    batch_size: int = Field(16, ge=1)
    """Completions written at once."""
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
                    "generation.run_programs = true if you want that (they are sandboxed, see florana.score.programs)"
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
