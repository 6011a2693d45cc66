"""Formulas of the documentation: a fenced block `math` becomes MathML, which browsers draw without a script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def block(source: str, *settings: Any, **more: Any) -> str:
    """The block as MathML; the arguments beside `source` are those of pymdownx.superfences, and are not needed."""
    return f'<div class="formula">{convert(source, display="block")}</div>'
