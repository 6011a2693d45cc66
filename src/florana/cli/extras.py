"""A package that is not installed, told as the extra that brings it."""

from __future__ import annotations

from florana.errors import InputError

EXTRA_OF = {
    "transformers": "train",
    "peft": "train",
    "datasets": "train",
    "pandas": "train",
    "pyarrow": "train",
    "flwr_datasets": "train",
    "sklearn": "train",
    "flwr": "flower",
    "cryptography": "secure",
    "Crypto": "secure",
    "dp_accounting": "private",
    "gguf": "gguf",
    "ray": "simulation",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}


def missing(error: ModuleNotFoundError) -> InputError | None:
    """The error as an InputError that names the extra; None where the module is of none of them: then it is a bug.

    Args:
        error: what an import raised.

    Examples:
        >>> told = missing(ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners"))
        >>> print(told)
        this needs the package peft, which is not installed
        fix: pip install 'florana[train]'
        >>> missing(ModuleNotFoundError("No module named 'florana.x'", name="florana.x")) is None
        True
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA_OF:
        return None
    return InputError(
        f"this needs the package {package}, which is not installed", fix=f"pip install 'florana[{EXTRA_OF[package]}]'"
    )
