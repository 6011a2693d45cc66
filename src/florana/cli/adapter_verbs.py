"""The verbs for adapters on disk, `merge` and `inspect`: they parse, call one function each, and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from florana.errors import RecipeError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
NORMALIZE = "on: weights are divided by their sum; off: taken as they are. Default: on, where none is negative."


def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT LoRA folders on one base model.")],
    out: Annotated[Path, typer.Option(help="A new folder for the merged adapter.")],
    method: Annotated[str, typer.Option(help="best-rank, stack (exact), flora-na or fedit.")] = "best-rank",
    rank: Annotated[int | None, typer.Option(help="Of the result, for best-rank. Default: the largest.")] = None,
    weights: Annotated[str | None, typer.Option(help="One per adapter, like 3,1,1 or 1,-0.5. Default: equal.")] = None,
    normalize: Annotated[str | None, typer.Option(help=NORMALIZE)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the widest.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model's name in the result.")] = None,
    scope: Annotated[str | None, typer.Option(help="Of flora-na: module or component. Default: module.")] = None,
    as_json: Json = False,
) -> None:
    """Merge LoRA adapters exactly, or as exactly as a rank allows, and say how exactly that is.

    Example: florana merge north south west --weights 1200,800,400 --rank 16 --out merged
    """
    from florana.adapters.merge import merge as merge_folders
    from florana.cli.console import console_of
    from florana.cli.display import counting, merge_line, merge_table

    console = console_of(as_json)
    with counting(console, "merging", "modules") as done:
        result = merge_folders(
            adapters,
            out,
            method=method,
            rank=rank,
            weights=_numbers(weights),
            normalize=normalize,
            dtype=dtype,
            base=base,
            scope=scope,
            done=done,
        )
    if as_json:
        typer.echo(json.dumps({**result.to_json(), "out": str(out)}, indent=1))
    elif console:
        console.print(merge_table(result))
        console.print(merge_line(result), highlight=False, soft_wrap=True)
        terms = sum(max(source.ranks) for source in result.sources)
        if result.rank > terms:
            console.print(f"note: the sum has rank {terms} at most, the rest is zeros: --rank {terms} is as exact")
        for note in result.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        if len({adapter.resolve() for adapter in adapters}) < len(adapters):
            console.print("note: an adapter is given more than once and counts as often")
        console.print(
            f"adapter: {out} (PEFT loads it as it is; README.md says how it was made)", highlight=False, soft_wrap=True
        )


def inspect(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT LoRA folders.")],
    weights: Annotated[str | None, typer.Option(help="One per adapter, like 3,1,1 or 1,-0.5. Default: equal.")] = None,
    normalize: Annotated[str | None, typer.Option(help=NORMALIZE)] = None,
    as_json: Json = False,
) -> None:
    """Show what adapters are, how far apart they are, and what each way of merging them would lose.

    Example: florana inspect north south west
    """
    from florana.adapters.inspect import inspect as inspect_folders
    from florana.cli.console import console_of
    from florana.cli.display_use import inspection_tables

    result = inspect_folders(adapters, _numbers(weights), normalize)
    console = console_of(as_json)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1))
    elif console:
        for told in inspection_tables(result):
            console.print(told, highlight=False, soft_wrap=isinstance(told, str))
        for note in result.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        bases = sorted({sheet.base_model for sheet in result.sheets})
        if len(bases) > 1:
            console.print(f"note: they name different base models ({', '.join(bases)}); merge will ask for --base")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights {text!r} is not a list of numbers", fix="for example --weights 3,1,1") from None
