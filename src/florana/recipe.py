"""The recipe: everything a run needs, in one strict TOML file.

A misspelt key is refused with the nearest right one; combinations that cannot hold are refused here, before anything
is written. Relative paths are relative to the recipe's own folder. `to_toml` writes the resolved recipe, which runs again.
"""

from __future__ import annotations

import inspect
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from florana.errors import RecipeError, nearest
from florana.strategy import STRATEGIES
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


class Data(Section):
    """Where the examples are: files (csv, tsv, jsonl, json, parquet), a hub name, or `stdlib-docstrings`."""

    train: str
    test: str | None = None
    """The common test set; None sets `test_share` of the training rows apart, by the seed."""
    test_share: float = Field(0.2, gt=0, lt=1)
    text: str | list[str] = "text"
    """The column with the text, or two columns (a pair; prompt and continuation for causal-lm)."""
    label: str | None = None
    """The column with the class; required for sequence-classification."""
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

    kind: Literal["iid", "dirichlet", "pathological", "column", "length", "linear", "square", "exponential"] = "iid"
    """dirichlet: shares of each class by Dirichlet(alpha). pathological: `classes` classes each. column: one client per
    value of `by`. length: rows sorted by text length. linear, square, exponential: unequal sizes."""
    clients: int | None = Field(None, ge=1)
    """How many; given by the data for `column`."""
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

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        if self.task == "sequence-classification" and self.data.label is None:
            raise ValueError("data.label is missing: sequence-classification needs the column with the class")
        if self.task == "causal-lm" and self.model.head == "personal":
            raise ValueError("model.head = 'personal' has no meaning for causal-lm: no tensor is trained whole")
        if self.partition.kind in ("dirichlet", "pathological", "column") and not (
            self.partition.by or self.data.label
        ):
            raise ValueError(f"partition.by is missing: {self.partition.kind} needs a column to split by")
        if self.partition.kind != "column" and self.partition.clients is None:
            raise ValueError(f"partition.clients is missing: {self.partition.kind} needs the number of clients")
        per_round, clients = self.federation.clients_per_round, self.partition.clients
        if clients is not None and per_round is not None and per_round > clients:
            raise ValueError(f"federation.clients_per_round is {per_round}, but there are {clients} clients")
        reached = per_round if per_round is not None else clients
        if reached is not None and self.federation.min_clients > reached:
            raise ValueError(f"federation.min_clients is {self.federation.min_clients}, but {reached} are asked")
        if self.model.quantization != "none" and self.model.device in ("cpu", "mps"):
            raise ValueError(
                f"model.quantization = '{self.model.quantization}' needs model.device = 'cuda' (or 'auto' where there is one)"
            )
        return self

    def build_strategy(self) -> Strategy:
        """The strategy with its options."""
        options = {name: value for name, value in self.strategy.items() if name != "name"}
        return STRATEGIES[self.strategy["name"]](**options)

    def to_toml(self) -> str:
        """The recipe with every value in place; None values are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `key=value` overrides (dotted keys, TOML values) put over it.

    Raises:
        RecipeError: the file cannot be read or is not TOML, a key or value is wrong, or a combination cannot hold.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}", fix="give the path of a TOML file; recipes/ has examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read", why=str(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the recipe {path} is not valid TOML", why=str(error)) from None
    for override in overrides:
        _override(table, override)
    return resolve(check(table, str(path)), path.resolve().parent)


def check(table: Mapping[str, Any], source: str) -> Recipe:
    """The recipe in a table. Raises RecipeError with every fault found, the nearest right key named."""
    try:
        recipe = Recipe.model_validate(dict(table))
    except ValidationError as error:
        faults = [_fault(dict(fault)) for fault in error.errors()]
        raise RecipeError(f"{source}: " + "\n".join(faults)) from None
    _check_strategy(recipe.strategy, source)
    return recipe


def resolve(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with every relative path that exists below `folder` (or that looks like a path) made absolute."""

    def absolute(name: str | None) -> str | None:
        if name is None or name.startswith("package:"):
            return name
        looks = name.startswith((".", "/", "~")) or Path(name).suffix.lower() in {
            ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".gz",
        }  # fmt: skip
        place = (folder / Path(name).expanduser()).resolve()
        return str(place) if looks or place.exists() else name

    data = recipe.data.model_copy(update={"train": absolute(recipe.data.train), "test": absolute(recipe.data.test)})
    model = recipe.model.model_copy(update={"base": absolute(recipe.model.base)})
    return recipe.model_copy(update={"data": data, "model": model})


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, with both values."""

    def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in table.items():
            result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return result

    before, after = flat(old.model_dump()), flat(new.model_dump())
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key.strip()):
        raise RecipeError(f"--set {text!r} is not key=value", fix="for example --set federation.rounds=20")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    *path, last = key.strip().split(".")
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {text!r}: '{name}' is a value, not a table")
    table[last] = parsed


def _fault(fault: dict[str, Any]) -> str:
    path = [str(step) for step in fault["loc"] if not str(step).startswith(("list[", "literal["))]
    where = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{where}': {nearest(path[-1], _keys_beside(path))}"
    if fault["type"] == "missing":
        return f"the key '{where}' is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"'{where}': {message} (it is {fault['input']!r})" if where and fault["type"] != "value_error" else message


def _keys_beside(path: Sequence[str]) -> list[str]:
    """The keys known where an unknown one was found; for a table nobody knows, those of the top."""
    section: type[BaseModel] = Recipe
    for step in path[:-1]:
        annotation = section.model_fields[step].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return list(section.model_fields)


def _check_strategy(table: Mapping[str, Any], source: str) -> None:
    name = table.get("name")
    if not isinstance(name, str):
        raise RecipeError(f"{source}: the key 'strategy.name' is missing", fix=nearest("", STRATEGIES))
    if name not in STRATEGIES:
        raise RecipeError(f"{source}: there is no strategy '{name}'", fix=nearest(name, STRATEGIES))
    build = STRATEGIES[name]
    known = typing.get_type_hints(build)
    parameters = inspect.signature(build).parameters
    for key, value in table.items():
        if key == "name":
            continue
        if key not in parameters:
            hint = nearest(key, parameters) if parameters else f"'{name}' has no options"
            raise RecipeError(f"{source}: unknown key 'strategy.{key}': {hint}")
        allowed = typing.get_args(known[key]) if typing.get_origin(known[key]) is Literal else None
        if allowed is not None and value not in allowed:
            raise RecipeError(
                f"{source}: 'strategy.{key}' is {value!r}", fix=f"one of {', '.join(map(repr, allowed))}"
            )
        expected = known[key]
        if allowed is None and isinstance(expected, type | types.UnionType) and not isinstance(value, expected):
            raise RecipeError(f"{source}: 'strategy.{key}' is {value!r}, not {expected}")
