"""What other tools and papers call the methods: a name of theirs is answered with the one here."""

from __future__ import annotations

from collections.abc import Collection

from florana.errors import nearest

OTHER_NAMES = {
    "average": "fedit",
    "fedavg": "fedit",
    "linear": "fedit",
    "mean": "fedit",
    "florana": "flora-na",
    "svd": "best-rank",
    "bestrank": "best-rank",
    "exact": "oracle",
    "ffa": "ffa-lora",
    "fedsa": "fedsa-lora",
    "fedex": "fedex-lora",
    "fair": "lora-fair",
    "lorafair": "lora-fair",
    "fedsb": "fed-sb",
}
"""Lower case, without `-` and `_` -> the method. PEFT's `linear` and `svd` stand for what they do to products."""


def method_hint(name: str, known: Collection[str], more: dict[str, str] | None = None) -> str:
    """What to do about a method's name that is not known.

    Args:
        name: as it was given.
        known: the names there are.
        more: further names of other tools, before those above.

    Examples:
        >>> method_hint("FedAvg", ["fedit", "fedsvd"])
        "its name here is 'fedit'"
        >>> method_hint("fedits", ["fedit", "fedsvd"])
        "did you mean 'fedit'?"
    """
    plain = name.lower().replace("-", "").replace("_", "")
    found = ((more or {}) | {key: value for key, value in OTHER_NAMES.items() if key not in (more or {})}).get(plain)
    return f"its name here is '{found}'" if found in known else nearest(name, known)
