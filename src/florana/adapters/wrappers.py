"""Names that a program puts around a module while it trains, and that are no part of the model's own names.

torch.compile puts `_orig_mod` into the name of a tensor, FSDP `_fsdp_wrapped_module`, activation checkpointing
`_checkpoint_wrapped_module`, wherever the wrapped module stands; data parallelism and DeepSpeed put `module` in front.
"""

from __future__ import annotations

import re

_WRAPPERS = re.compile(r"(?<![^.(|^])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\\?\.")
_IN_FRONT = re.compile(r"^((?:base_model\.(?:model\.)?)?)(?:module\.)+")


def unwrapped(name: str) -> str:
    """The name without wrappers'; of a tensor, of a module, or of a pattern for modules.

    Examples:
        >>> unwrapped("module.base_model.model._orig_mod.layers.0._checkpoint_wrapped_module.q.lora_A.weight")
        'base_model.model.layers.0.q.lora_A.weight'
        >>> unwrapped("layers.0.module.q")
        'layers.0.module.q'
    """
    name = _WRAPPERS.sub("", name)
    while (shorter := _IN_FRONT.sub(r"\1", name)) != name:
        name = shorter
    return name


def unwrapped_everywhere(name: str) -> str:
    """The same, with `module` a wrapper wherever it stands: for names that are another adapter's without it.

    A model may have modules of that name (LeViT has), so it is not the rule.

    Examples:
        >>> unwrapped_everywhere("layers.0.module.q")
        'layers.0.q'
    """
    return re.sub(r"(?<![^.])module\.", "", unwrapped(name))
