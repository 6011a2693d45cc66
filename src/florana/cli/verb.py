"""A command whose positional arguments keep their help text."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_args, get_origin

from typer.core import TyperCommand


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


def _texts(signature: inspect.Signature) -> dict[str, str]:
    found = {}
    for name, parameter in signature.parameters.items():
        if get_origin(parameter.annotation) is Annotated:
            told = getattr(get_args(parameter.annotation)[1], "help", None)
            if told is not None:
                found[name] = told
    return found
