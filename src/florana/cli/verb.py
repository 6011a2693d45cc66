"""A command whose positional arguments keep their help text, and a group that answers a wrong name once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

import click
from typer.core import TyperCommand, TyperGroup

from florana.displayable import displayable
from florana.errors import nearest

OTHER_VERBS = {
    "train": "run",
    "fit": "run",
    "simulate": "run",
    "resume": "run --resume",
    "aggregate": "merge",
    "average": "merge",
    "eval": "evaluate",
    "test": "evaluate",
    "generate": "predict",
    "chat": "predict",
    "infer": "predict",
    "info": "inspect",
    "show": "inspect",
    "server": "serve",
    "client": "join",
    "study": "compare",
}
"""What other tools call the verbs -> their names here."""


class Verb(TyperCommand):
    """A typer command that shows the text of its arguments with every click.

    typer before 0.21, which flwr asks for, sets an argument's `help` and then calls click's constructor; click from
    8.5 on has a `help` of its own there and sets it to None. The text is read again from the function's annotations.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        texts = _texts(inspect.signature(self.callback, eval_str=True)) if self.callback else {}
        for param in self.params:
            if getattr(param, "help", None) is None and param.name in texts:
                vars(param)["help"] = texts[param.name]


class Verbs(TyperGroup):
    """The group of all verbs: a name it lacks is answered with the nearest one, once, or with where the verb is."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command behind the first word. Raises UsageError, with the right word, where there is none."""
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            raise click.UsageError(f"there is no verb '{displayable(word, 60)}'; {_instead(word, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def _instead(word: str, commands: Mapping[str, click.Command]) -> str:
    if word.lower() in OTHER_VERBS:
        return f"its name here is 'florana {OTHER_VERBS[word.lower()]}'"
    for name, command in commands.items():
        if isinstance(command, click.Group) and word in command.commands:
            return f"it is 'florana {name} {word}'"
    return f"{nearest(word, commands)} ('florana --help' lists all)"


def _texts(signature: inspect.Signature) -> dict[str, str]:
    found = {}
    for name, parameter in signature.parameters.items():
        if get_origin(parameter.annotation) is Annotated:
            told = getattr(get_args(parameter.annotation)[1], "help", None)
            if told is not None:
                found[name] = told
    return found
