"""The verbs for finished adapters, `predict` and `evaluate`: they parse, call one function each, and print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from florana.errors import InputError, RecipeError

if TYPE_CHECKING:
    from florana.recipe.data_schema import Generation
    from florana.recipe.usage import Usage
    from florana.train.generation_eval import Keep

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Adapter = Annotated[Path, typer.Argument(help="A run folder, a merged folder, any PEFT LoRA folder, or a hub name.")]
Base = Annotated[str | None, typer.Option(help="The base model, where the adapter names one that is not here.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Labels = Annotated[str | None, typer.Option(help="Names of the classes, a,b,c. Default: those in the folder.")]
Text = Annotated[str | None, typer.Option(help="The file's column with the text; two of a pair: a,b.")]


def predict(
    adapter: Adapter,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts. Default: lines of standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Texts from a csv, tsv, jsonl, json or parquet file.")] = None,
    text: Text = None,
    base: Base = None,
    labels: Labels = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer, of language models.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers per text, with a temperature.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Ask a finished adapter: classes with probabilities, scores, or text.

    Example: florana predict runs/sst2 "a film that never ends"
    """
    if samples > 1 and temperature == 0:
        raise RecipeError("--samples above 1 needs --temperature above 0", why="greedy answers are alike")
    if texts and file:
        raise RecipeError("texts are given, and --file too", fix="give one of them")
    from florana.cli.console import console_of
    from florana.cli.display_use import answers_table
    from florana.train.finished import open_finished
    from florana.train.predict import classify, write

    model = open_finished(adapter, base, device, _names(labels))
    asked = _from_file(file, text, model.usage) if file else [(line,) for line in texts or _lines()]
    if model.usage.task == "causal-lm":
        prompts = [line[0] for line in asked]
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        answers = write(model, prompts, samples=samples, seed=seed, **options)
    else:
        answers = classify(model, asked)
    console = console_of(as_json)
    if as_json:
        typer.echo(json.dumps(answers, indent=1, ensure_ascii=False))
    elif console:
        if model.usage.task == "causal-lm":
            for answer in answers:
                console.print(answer["prompt"], style="dim", highlight=False, soft_wrap=True)
                console.print(answer["completion"], highlight=False, soft_wrap=True)
        else:
            console.print(answers_table(answers))


def evaluate(
    adapter: Adapter,
    data: Annotated[Path, typer.Option(help="A csv, tsv, jsonl, json or parquet file with the answers.")],
    text: Text = None,
    label: Annotated[str | None, typer.Option(help="The file's column with the class or score.")] = None,
    base: Base = None,
    labels: Labels = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 32,
    benchmark: Annotated[
        str | None,
        typer.Option(help="Have it write, and score that: gsm8k, math, humaneval or mbpp; --data holds these."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the benchmark, as in a recipe's section generation."
        ),
    ] = None,
    completions: Annotated[
        Path | None, typer.Option(help="A new jsonl file for what it wrote, with the verdicts.")
    ] = None,
    starting: Annotated[
        bool, typer.Option("--starting", help="Measure the base model too, as it was before training.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the benchmark's samples and worked examples.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a finished adapter on rows with answers: the figures of its task, or of a generation benchmark.

    Example: florana evaluate runs/sst2 --data test.csv
    """
    from florana.cli.console import console_of
    from florana.train.evaluate import evaluate as measured
    from florana.train.finished import open_finished
    from florana.train.finished_data import rows_with_answers

    asked = _benchmark(benchmark, data, set_ or [], completions)
    model = open_finished(adapter, base, device, _names(labels))
    if asked is not None:
        from florana.runs.completions import write_lines
        from florana.train.generation_eval import read_benchmark

        if model.usage.task != "causal-lm":
            raise InputError(
                f"{adapter} does not write text: it is a model for {model.usage.task}", fix="leave --benchmark out"
            )
        problems = read_benchmark(asked, model, seed)
        counted = {"problems": len(problems.rows)}
        score: Callable[[Keep], dict[str, float]] = partial(problems.run, model)
    else:
        rows = rows_with_answers(model, data, _columns(text), label)
        counted = {"rows": len(rows)}

        def score(keep: Keep) -> dict[str, float]:
            return measured(model, rows, batch_size)

    before, written = dict[str, float](), list[Mapping[str, Any]]()
    if starting:  # first: it may be refused
        with model.starting():
            before = score(lambda texts: None)
    figures = score(written.extend)
    if completions is not None:
        write_lines(completions, written)
    console = console_of(as_json)
    if as_json:
        typer.echo(json.dumps(counted | figures | ({"starting": before} if starting else {}), indent=1))
    elif console:
        for name, count in counted.items():
            console.print(f"{name}: {count}", highlight=False)
        for name, value in figures.items():
            was = f" (before training {before[name]:.4f})" if starting else ""
            console.print(f"{name}: {value:.4f}{was}", highlight=False)


def _benchmark(name: str | None, data: Path, assign: list[str], completions: Path | None) -> Generation | None:
    """The settings of --benchmark, before the model is loaded."""
    if name is None:
        if assign or completions is not None:
            given = "--set" if assign else "--completions"
            raise RecipeError(f"{given} is of --benchmark, which is not given", fix="for example --benchmark gsm8k")
        return None
    if completions is not None and completions.exists():
        raise RecipeError(f"{completions} exists already", fix="name a new file")
    from florana.recipe.load import generation_settings

    return generation_settings(name, data, assign)


def _from_file(file: Path, text: str | None, usage: Usage) -> list[tuple[str, ...]]:
    from florana.train.finished_data import texts_of

    return texts_of(file, _columns(text), usage)


def _columns(text: str | None) -> list[str] | None:
    return [column for column in text.split(",") if column] if text else None


def _names(labels: str | None) -> list[str] | None:
    return labels.split(",") if labels else None


def _lines() -> list[str]:
    """Lines from the keyboard or a pipe, to the end."""
    if sys.stdin.isatty():
        typer.echo("one text per line; end with Ctrl-D", err=True)
    found = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not found:
        raise RecipeError("there is no text", fix='give it behind the adapter: florana predict ADAPTER "a text"')
    return found
