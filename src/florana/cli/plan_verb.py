"""The verb `plan`: parses, counts, prints."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def plan(
    model: Annotated[
        str,
        typer.Argument(help="roberta-large, llama-2-7b, llama-3-8b, mistral-7b, gemma-2-9b; a folder; a hub name."),
    ],
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 8,
    clients: Annotated[int, typer.Option(help="Clients per round.")] = 10,
    targets: Annotated[str | None, typer.Option(help="Module names, like q_proj,v_proj, or all-linear.")] = None,
    task: Annotated[
        str | None, typer.Option(help="sequence-classification or causal-lm. Default: the first that the model has.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help=r"Like fedit,best-rank\[source=sums]. Default: all.")] = None,
    base_bits: Annotated[int, typer.Option(help="Bits per parameter of the frozen base: 32, 16, 8, 4.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Count parameters, bytes and memory of every method for a model, from its configuration alone.

    Example: florana plan llama-2-7b --rank 16 --clients 10
    """
    from florana.errors import RecipeError
    from florana.runs.cost_model import plan_model
    from florana.study.named_methods import method_of, split_methods
    from florana.train.shapes import shapes_of

    asked = [method_of(text) for text in split_methods(methods or "")]
    for method in asked:
        if method.settings:
            raise RecipeError(
                f"--methods {method.label}: {', '.join(method.settings)} is of a recipe, and is not counted here",
                fix="name the method with options of its own alone; florana run --dry-run counts a whole recipe",
            )
    shapes = shapes_of(model, _words(targets), task)
    result = plan_model(
        shapes.model,
        shapes.modules,
        shapes.parameters,
        rank=rank,
        clients=clients,
        methods={method.label: method.strategy for method in asked},
        base_bits=base_bits,
    )
    from florana.cli.console import console_of
    from florana.cli.display_study import model_plan_table

    console = console_of(as_json)
    if console:
        console.print(model_plan_table(result))
    else:
        typer.echo(json.dumps(result.to_json(), indent=1))


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]
